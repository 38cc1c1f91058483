"""A post: a text and images, with what is known about it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.images import ImageLimits, read_data_url

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class ImageSource(Protocol):
    """Where an encoded image comes from, such as a path; it can be hashed and pickled."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    def read_bytes(self) -> bytes:
        """The encoded image, read anew.

        Raises:
            OSError: it is not there or cannot be read.
            BadRequestError: what should hold it does not.
        """


@dataclass(frozen=True)
class DataUrl:
    """An image within the row itself, decoded only when it is asked for.

    Attributes:
        url: `data:image/...;base64,...`; the size is left to whoever admits the image.
    """

    url: str = field(repr=False)
    name = "data URL"

    def read_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            BadRequestError: the URL is not base64.
        """
        return read_data_url(self.url, ImageLimits(max_bytes=sys.maxsize), "image")


@dataclass(frozen=True, kw_only=True)
class Post:
    """A text and images; either may be missing, images may be several.

    Attributes:
        id: unique within its source.
        text: the post's line of text, may be empty.
        images: where images come from, such as paths, or their encoded bytes.
        labels: known labels by field, e.g. `{"image": "positive", "text": "neutral"}`.
        asks: what its row asks for by itself: `model`, `label_structure`, `retention_ratio` or
            `selector`, none of them None.
    """

    id: str
    text: str = ""
    images: tuple[ImageSource | bytes, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, Any] = field(default_factory=dict)

    def image_bytes(self) -> list[bytes]:
        """The encoded images; reads files only now.

        Raises:
            OSError: an image is not there or cannot be read.
            BadRequestError: an image within the row is not base64.
        """
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
