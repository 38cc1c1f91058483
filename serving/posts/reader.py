"""What every reader of posts is: an iterable that reads its source anew each time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import ClassVar

from serving.errors import ConfigError
from serving.posts.ids import Duplicates, IdList, IdsInUse
from serving.posts.places import Place, UrlPath
from serving.posts.post import DataUrl, ImageSource, Post, Unreadable
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
        duplicates: what to do with an id that was there before.
    """

    chosen: IdList | None = None
    part: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    structure: LabelStructure | None = None
    duplicates: Duplicates = "error"


class RowError(Exception):
    """A row that is no post: what is wrong with it, without its place."""


Found = tuple[str, Post | Unreadable]
"""A place for messages, such as `line 3`, and what stands there."""


class Posts(ABC):
    """Posts of one source; every iteration reads it anew.

    Attributes:
        num_posts: how many there are, None where only reading tells.
        num_not_utf8: how many texts read in the last iteration were not UTF-8.
        num_duplicates: how many posts of the last iteration had an id that was there before.
        num_left_out: how many posts the data set's own rule leaves out.
    """

    description: ClassVar[str]
    has_own_names: ClassVar[bool] = False
    """Whether `Reading.fields` may say how the source calls its fields."""

    _is_odd = False
    """Whether some text of the post being read was not UTF-8."""

    def __init__(self, source: Place, reading: Reading) -> None:
        self.source = source
        self.reading = reading
        self._folder = source.parent
        self.num_posts = None if reading.chosen is None else len(reading.chosen)
        self.num_not_utf8 = 0
        self.num_duplicates = 0
        self.num_left_out = 0

    def __iter__(self) -> Iterator[Post]:
        for entry in self.entries():
            yield self._post_of(entry)

    def entries(self) -> Iterator[Post | Unreadable]:
        """Posts, and in their places the rows that are none.

        A row that is not readable does not end the reading; what concerns the whole source does.

        Raises:
            ConfigError: the source cannot be read, or an id is there twice where that is an error.
        """
        self.num_not_utf8 = self.num_duplicates = 0
        self._is_odd = False
        return self._entries()

    def _post_of(self, entry: Post | Unreadable) -> Post:
        if isinstance(entry, Unreadable):
            raise ConfigError(entry.message)
        return entry

    def _entries(self) -> Iterator[Post | Unreadable]:
        chosen, is_all_told = self.reading.chosen, True
        with closing(IdsInUse(self.reading.duplicates)) as ids:
            for where, entry in self._found():
                is_told = isinstance(entry, Post) or entry.id != where
                is_all_told &= is_told
                id_ = self._claim(ids, where, entry.id) if is_told else ids.invent(where)
                is_odd, self._is_odd = self._is_odd, False
                self.num_duplicates = ids.num_duplicates
                if id_ is None or (is_told and chosen is not None and id_ not in chosen):
                    continue
                self.num_not_utf8 += is_odd
                yield entry if id_ is entry.id else replace(entry, id=id_)
            # An id that is listed may be that of a row which could not be read that far.
            if chosen is not None and is_all_told:
                chosen.check_all_in(ids.seen, self.source.name)

    def _claim(self, ids: IdsInUse, where: str, id_: str) -> str | None:
        try:
            return ids.claim(id_)
        except ValueError as error:
            raise self._fault(where, str(error)) from error

    @staticmethod
    @abstractmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""

    @classmethod
    def parts(cls, source: Place) -> list[str]:
        """Names of the parts that the source is published in, as splits."""
        return []

    @abstractmethod
    def _found(self) -> Iterator[Found]:
        """All rows of the source, whatever their ids."""

    def _fault(self, where: str, message: object) -> ConfigError:
        return ConfigError(self._said(where, message))

    def _unreadable(self, where: str, error: RowError, id_: str | None = None) -> Unreadable:
        """A row that is no post; without an id of its own it is called by its place."""
        return Unreadable(id=where if id_ is None else id_, message=self._said(where, error))

    def _said(self, where: str, message: object) -> str:
        return f"{self.source.name} {where}: {message}"

    def _read_text(self, path: Place) -> str:
        try:
            text, is_odd = read_text(path)
        except OSError as error:
            raise RowError(f"text {path.name!r} cannot be read: {error.strerror}") from error
        self._is_odd |= is_odd
        return text

    def _image(self, image: str | bytes) -> ImageSource | bytes:
        """An image as a row has it: bytes, a data URL, or a path relative to the folder."""
        if isinstance(image, bytes):
            return image
        if image.startswith("data:"):
            return DataUrl(image)
        is_outside = isinstance(self._folder, UrlPath) and image.startswith("/")
        if not image or "://" in image or is_outside:
            raise RowError(
                f"image={image[:80]!r}; allowed are a path relative to {self.source.name} and a "
                "data URL (data:image/jpeg;base64,...)",
            )
        return self._folder / image


def told_id(values: object, name: str = "id") -> str | None:
    """The id of a row that is no post, where it has one that could be a post's."""
    id_ = values.get(name) if isinstance(values, dict) else None
    return str(id_) if isinstance(id_, str | int) and not isinstance(id_, bool) else None
