"""What every reader of posts is: an iterable that reads its source anew each time."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from serving.errors import BadRequestError, ConfigError
from serving.images import ImageLimits, read_data_url
from serving.posts.ids import IdList, IdSet
from serving.posts.post import Post
from serving.posts.texts import read_text
from serving.structures import LabelStructure


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is to be read.

    Attributes:
        chosen: only these ids.
        part: only this part of a source that is published in parts.
        fields: our name of a field to the source's, for rows of the user's own.
        structure: parses answers that stand as one text.
    """

    chosen: IdList | None = None
    part: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    structure: LabelStructure | None = None


class Posts(ABC):
    """Posts of one source; every iteration reads it anew.

    Attributes:
        num_posts: how many there are, None where only reading tells.
        num_not_utf8: how many texts read in the last iteration were not UTF-8.
        num_left_out: how many posts the data set's own rule leaves out.
    """

    description: ClassVar[str]
    has_own_names: ClassVar[bool] = False
    """Whether `Reading.fields` may say how the source calls its fields."""

    def __init__(self, source: Path, reading: Reading) -> None:
        self.source = source
        self.reading = reading
        self.num_posts = None if reading.chosen is None else len(reading.chosen)
        self.num_not_utf8 = 0
        self.num_left_out = 0

    def __iter__(self) -> Iterator[Post]:
        self.num_not_utf8 = 0
        return self._read()

    @staticmethod
    @abstractmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""

    @classmethod
    def parts(cls, source: Path) -> list[str]:
        """Names of the parts that the source is published in, as splits."""
        return []

    @abstractmethod
    def _read(self) -> Iterator[Post]: ...

    def _read_text(self, path: Path) -> str:
        try:
            text, is_odd = read_text(path)
        except OSError as error:
            raise ConfigError(f"text {path.name!r} cannot be read: {error.strerror}") from error
        self.num_not_utf8 += is_odd
        return text


class StreamedPosts(Posts):
    """Posts whose ids only reading tells: checked to be unique, and chosen, on the way."""

    _is_odd = False
    """Whether some text of the post being read was not UTF-8."""

    def _read(self) -> Iterator[Post]:
        chosen, seen = self.reading.chosen, IdSet()
        self._is_odd = False
        for where, post in self._found():
            if not seen.add(post.id):
                raise self._fault(where, f"id={post.id!r} is there twice; ids must be unique")
            is_odd, self._is_odd = self._is_odd, False
            if chosen is None or post.id in chosen:
                self.num_not_utf8 += is_odd
                yield post
        if chosen is not None:
            chosen.check_all_in(seen, self.source.name)
        seen.close()

    @abstractmethod
    def _found(self) -> Iterator[tuple[str, Post]]:
        """All posts of the source, each with its place for messages, such as `line 3`."""

    def _fault(self, where: str, message: str) -> ConfigError:
        return ConfigError(f"{self.source.name} {where}: {message}")

    def _image(self, where: str, image: str) -> Path | bytes:
        """An image as a row spells it: a path relative to the source's folder, or a data URL."""
        if image.startswith("data:"):
            try:
                return read_data_url(image, ImageLimits(max_bytes=sys.maxsize), "image")
            except BadRequestError as error:
                raise self._fault(where, error.message) from error
        if not image or "://" in image:
            raise self._fault(
                where,
                f"image={image[:80]!r}; allowed are a path relative to {self.source.name} and a "
                "data URL (data:image/jpeg;base64,...)",
            )
        return self.source.parent / image
