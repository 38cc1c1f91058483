"""A post: a text and images, with what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Post:
    """A text and images; either may be missing, images may be several.

    Attributes:
        id: unique within its source.
        text: the post's line of text, may be empty.
        images: paths to image files, or their encoded bytes.
        labels: known labels by field, e.g. `{"image": "positive", "text": "neutral"}`.
    """

    id: str
    text: str = ""
    images: tuple[Path | bytes, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def image_bytes(self) -> list[bytes]:
        """The encoded images; reads files only now."""
        return [item if isinstance(item, bytes) else item.read_bytes() for item in self.images]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A row that is no post.

    Attributes:
        id: the row's own where that can be told, else its place, such as `line 3`; unique among
            the ids of the posts of its source.
        message: the file, the place in it, what is wrong and what is allowed.
    """

    id: str
    message: str
