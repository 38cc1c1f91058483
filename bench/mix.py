"""What requests ask for: mixes of adapters, ratios, structures and selectors, and their posts."""

from __future__ import annotations

import argparse
import base64
import itertools
import mimetypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.contest import make_text
from bench.outcome import BenchError, positive
from bench.pictures import picture_url
from serving.errors import SieveError
from serving.posts import Post, read_posts
from serving.structures import STRUCTURES


@dataclass(frozen=True, kw_only=True)
class Content:
    """A post as it is sent.

    Attributes:
        id: of the post.
        text: of the post.
        images: as data URLs.
        labels: known ones, by field.
    """

    id: str
    text: str
    images: tuple[str, ...]
    labels: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a request may ask for; each is drawn by itself, a value named twice twice as often.

    Attributes:
        adapters: models or adapters; None leaves it to the server, as below.
        ratios: retention ratios.
        structures: label structures.
        selectors: of patches.
    """

    adapters: Sequence[str | None] = (None,)
    ratios: Sequence[float | None] = (None,)
    structures: Sequence[str | None] = (None,)
    selectors: Sequence[str | None] = (None,)

    def draws(self, seed: int) -> Iterator[dict[str, Any]]:
        """Fields of `/v1/label`, without end."""
        rng = np.random.default_rng((seed, 7))
        names = {
            "model": self.adapters,
            "retention_ratio": self.ratios,
            "label_structure": self.structures,
            "selector": self.selectors,
        }
        while True:
            drawn = {name: of[int(rng.integers(len(of)))] for name, of in names.items()}
            yield {name: value for name, value in drawn.items() if value is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is sent."""
    group = parser.add_argument_group("requests", "a value named twice is sent twice as often")
    add = group.add_argument
    add("--adapters", nargs="+", metavar="NAME", help="models or adapters (default the server's)")
    add("--ratios", nargs="+", type=float, metavar="R", help="retention (default the server's)")
    add("--structures", nargs="+", metavar="NAME", help="label structures (default the server's)")
    add("--selectors", nargs="+", metavar="NAME", help="of patches (default the server's)")
    help_ = "posts: a folder of images, JSONL, MVSA, ... (default pictures of noise)"
    add("--data", help=help_)
    add("--picture-size", type=positive, default=224, help="of noise, pixels a side (default 224)")


def mix_of(options: argparse.Namespace) -> Mix:
    """The mix that the options ask for."""
    names = ("adapters", "ratios", "structures", "selectors")
    return Mix(**{name: getattr(options, name) or (None,) for name in names})


def contents(options: argparse.Namespace) -> Iterator[Content]:
    """Posts without end: synthetic ones are all different, those of --data come round again.

    Raises:
        BenchError: --data cannot be read or has no post.
    """
    if options.data is None:
        size = (options.picture_size, options.picture_size)
        for number in itertools.count():
            url = picture_url(options.seed, number, size)
            text = f"{make_text(options.seed, number)} {number}"
            yield Content(id=str(number), text=text, images=(url,), labels={})
    yield from itertools.cycle(read_contents(options.data))


def read_contents(data: str, most: int | None = None) -> list[Content]:
    """Posts of a source that our readers know, images as data URLs.

    Raises:
        BenchError: it cannot be read or has no post.
    """
    try:
        posts = itertools.islice(iter(read_posts(data)), most)
        found = [content_of(post) for post in posts]
    except (SieveError, OSError) as error:
        raise BenchError(f"--data {data}: {getattr(error, 'message', error)}") from error
    if not found:
        raise BenchError(f"--data {data}: has no posts; allowed is what `serving label` reads")
    return found


def content_of(post: Post) -> Content:
    """A post, encoded."""
    names = ["" if isinstance(image, bytes) else image.name for image in post.images]
    urls = [
        f"data:{mimetypes.guess_type(name)[0] or 'image/png'};base64,"
        + base64.b64encode(raw).decode()
        for name, raw in zip(names, post.image_bytes(), strict=True)
    ]
    return Content(id=post.id, text=post.text, images=tuple(urls), labels=dict(post.labels))


def label_body(content: Content, asked: dict[str, Any]) -> dict[str, Any]:
    """Body of `/v1/label`."""
    image = content.images[0] if len(content.images) == 1 else list(content.images)
    return {"text": content.text, **({"image": image} if content.images else {}), **asked}


def chat_body(content: Content, asked: dict[str, Any], model: str) -> dict[str, Any]:
    """Body of a streamed chat with the prompt of its label structure.

    Raises:
        BenchError: the structure is not one of ours, so its prompt is not known here.
    """
    name = asked.get("label_structure", "sentiment")
    if name not in STRUCTURES:
        raise BenchError(f"--structures {name}: with --stream one of {', '.join(STRUCTURES)}")
    text = STRUCTURES[name].prompt.replace("{text}", content.text)
    images = [{"type": "image_url", "image_url": {"url": url}} for url in content.images]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    stream = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    return {"model": model, "messages": messages, **asked, "label_structure": name, **stream}


def bodies(
    posts: Iterable[Content], mix: Mix, seed: int, chat_model: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and body of each request: labels, or streamed chats of a model."""
    for content, asked in zip(posts, mix.draws(seed), strict=False):
        if chat_model is None:
            yield content.id, label_body(content, asked)
        else:
            yield content.id, chat_body(content, {**asked}, asked.get("model", chat_model))
