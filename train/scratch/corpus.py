"""The training posts, in memory: texts, labels and pixels.

Letters: N posts, C labels of a field, S side of the square image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoImageProcessor

from serving.errors import BadRequestError, ConfigError
from serving.images import ImageLimits, decode_image
from serving.posts import Post
from train.demo.checkpoint import CLIP_MEAN, CLIP_STD

MIN_POSTS = 30


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Posts to learn from.

    Attributes:
        texts: of the posts, may be empty.
        pixels: `(N, 3, S, S)` uint8, a post's first image as the checkpoint's processor makes it;
            zeros where a post has none.
        has_image: `(N,)` bool.
        labels: by field, `(N,)` indices into `fields[field]`, -1 where unknown.
        fields: field to its labels, in the order in which they first occur.
    """

    texts: tuple[str, ...]
    pixels: np.ndarray
    has_image: np.ndarray
    labels: Mapping[str, np.ndarray]
    fields: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.texts)


def read_corpus(posts: Sequence[Post], processor_folder: Path) -> Corpus:
    """Decodes all images as the server does, and numbers the labels.

    Raises:
        ConfigError: too few posts or labels to learn from, or an image that does not open.
    """
    fields = label_fields(posts)
    processor = AutoImageProcessor.from_pretrained(processor_folder)
    side = processor.crop_size["height"]
    pixels = np.zeros((len(posts), 3, side, side), dtype=np.uint8)
    for index, post in enumerate(tqdm(posts, desc="images", unit="post", disable=None)):
        if post.images:
            pixels[index] = _pixels(post, processor)
    return Corpus(
        texts=tuple(post.text for post in posts),
        pixels=pixels,
        has_image=np.array([bool(post.images) for post in posts]),
        labels={
            field: np.array(
                [labels.index(post.labels[field]) if field in post.labels else -1 for post in posts]
            )
            for field, labels in fields.items()
        },
        fields=fields,
    )


def label_fields(posts: Sequence[Post]) -> dict[str, tuple[str, ...]]:
    """Fields that have at least two labels; of fields that always agree, the first.

    Raises:
        ConfigError: there are fewer than 30 posts, or no such field.
    """
    if len(posts) < MIN_POSTS:
        raise ConfigError(
            f"{len(posts)} posts are too few to learn from, at least {MIN_POSTS} are needed",
            param="data",
        )
    columns: dict[str, tuple[str | None, ...]] = {}
    for field in dict.fromkeys(field for post in posts for field in post.labels):
        column = tuple(post.labels.get(field) for post in posts)
        if len({*column} - {None}) > 1 and column not in columns.values():
            columns[field] = column
    if not columns:
        raise ConfigError(
            "no field of the posts' labels has two labels or more; the base learns from labels",
            param="data",
        )
    return {
        field: tuple(dict.fromkeys(label for label in column if label is not None))
        for field, column in columns.items()
    }


def describe_posts(posts: Sequence[Post]) -> dict[str, Any]:
    """What two builds on the same posts share: their number and a hash of ids, texts, labels."""
    rows = [[post.id, post.text, sorted(post.labels.items())] for post in posts]
    digest = hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
    return {"num_posts": len(posts), "posts_sha256": digest}


def _pixels(post: Post, processor: Any) -> np.ndarray:
    """A post's first image before normalisation, `(3, S, S)` uint8.

    Raises:
        ConfigError: it cannot be read; names the post.
    """
    image = post.images[0]
    try:
        raw = image if isinstance(image, bytes) else image.read_bytes()
        picture = decode_image(raw, ImageLimits())
    except (OSError, BadRequestError) as error:
        raise ConfigError(f"post {post.id!r}: its image cannot be used: {error}") from error
    seen = processor(images=picture, return_tensors="np")["pixel_values"][0]
    mean, std = np.array(CLIP_MEAN)[:, None, None], np.array(CLIP_STD)[:, None, None]
    return np.rint((seen * std + mean) * 255).clip(0, 255).astype(np.uint8)
