"""Synthetic posts: drawn faces and written sentences, paired as the joint table says.

Every split is a function of the seed: the same posts wherever it is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from serving.posts import Post
from train.demo.checkpoint import CLIP_MEAN, CLIP_STD
from train.demo.faces import LOOKS, draw_picture
from train.demo.joint import balanced_shares, draw_pairs, merged, mvsa_shares
from train.demo.sentences import Split, write_sentence

SPLITS: tuple[Split, ...] = ("train", "test", "unseen-words")


@dataclass(frozen=True, kw_only=True)
class SyntheticPost:
    """A post whose labels, signal patches and signal word are known.

    Attributes:
        pixels: `(112, 112, 3)` uint8.
        mask: `(64,)` bool, the patches that hold the face.
        labels: `image`, `text` and `multimodal`.
    """

    pixels: np.ndarray
    mask: np.ndarray
    text: str
    noun: str
    word: str
    labels: dict[str, str]


def synthesize(
    count: int, *, split: Split, balanced: bool, seed: int, start: int = 0
) -> Iterator[SyntheticPost]:
    """Posts `start` to `count` of a split.

    Args:
        count: how many the split has.
        split: `test` has held-out sentences and looks, `unseen-words` held-out words besides.
        balanced: merged labels equally often, instead of MVSA-Single's joint table.
        seed: of the whole data set.
        start: skip the posts before this one.
    """
    shares = balanced_shares() if balanced else mvsa_shares()
    pairs = draw_pairs(shares, count, _generator(seed, split, balanced))
    for index in range(start, count):
        yield _synthesize_one(pairs[index], split, _generator(seed, split, balanced, index))


def _synthesize_one(pair: tuple[str, str], split: Split, rng: np.random.Generator) -> SyntheticPost:
    text_label, image_label = pair
    picture = draw_picture(image_label, LOOKS["train" if split == "train" else "test"], rng)
    sentence = write_sentence(text_label, split, rng)
    return SyntheticPost(
        pixels=picture.pixels,
        mask=picture.mask,
        text=sentence.text,
        noun=sentence.noun,
        word=sentence.word,
        labels={"image": image_label, "text": text_label, "multimodal": merged(pair)},
    )


def _generator(seed: int, split: Split, balanced: bool, index: int = -1) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), int(balanced), index + 1])


def demo_posts(
    count: int, *, split: Split = "test", balanced: bool = False, seed: int = 0
) -> Iterator[Post]:
    """The same posts as everybody else sees them: PNG bytes, a text and labels."""
    for index, post in enumerate(synthesize(count, split=split, balanced=balanced, seed=seed)):
        yield Post(
            id=str(index + 1),
            text=post.text,
            images=(encode_png(post.pixels),),
            labels=post.labels,
        )


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of `(H, W, 3)` uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def stack_pixels(posts: Sequence[SyntheticPost]) -> Tensor:
    """Images of posts, `(N, 3, 112, 112)` uint8."""
    stacked = torch.from_numpy(np.stack([post.pixels for post in posts]))
    return stacked.permute(0, 3, 1, 2).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """uint8 `(N, 3, 112, 112)` as the checkpoint's processor gives it for images of that size."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
