"""Files with a post a row, under our names of fields or under the user's own."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serving.errors import ConfigError
from serving.posts.places import Place
from serving.posts.post import Post
from serving.posts.reader import Found, Posts, Reading, RowError, told_id
from serving.posts.texts import decoded_lines


class Row(BaseModel):
    """A post as JSONL and CSV spell it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | int | None = None
    text: str | None = None
    image: str | None = None
    images: list[str] | None = None
    labels: dict[str, str | None] | None = None

    @model_validator(mode="after")
    def _has_something(self) -> Row:
        if not self.model_fields_set & {"text", "image", "images"}:
            raise ValueError("a post needs text, image or images")
        if self.image and self.images:
            raise ValueError("image and images exclude each other")
        return self


class RowPosts(Posts):
    """Posts of a file with a post a row; image paths are relative to the file.

    Where `Reading.fields` gives the file's own names, fields that it does not name keep ours, and
    all others of the file are left alone. Without it, an unknown field is an error.
    """

    has_own_names = True
    columns: ClassVar[tuple[str, ...]] = ("id", "text", "image")
    row_type: ClassVar[type[Row]] = Row
    row_word: ClassVar[str] = "line"

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        unknown = [name for name in reading.fields if not self._is_known(name)]
        if unknown:
            raise ConfigError(
                f"fields names {unknown[0]!r}; allowed are {', '.join(self.columns)} and "
                "labels.FIELD, each with the name that the file has for it",
                param="fields",
            )

    def _is_known(self, name: str) -> bool:
        return name in self.columns or re.fullmatch(r"labels\.\w+", name) is not None

    def _found(self) -> Iterator[Found]:
        for number, values in self._rows():
            where = f"{self.row_word} {number}"
            try:
                yield where, self._post(number, values)
            except RowError as error:
                yield where, self._unreadable(where, error, told_id(values))

    @abstractmethod
    def _rows(self) -> Iterator[tuple[int, object]]:
        """Line number and values of each row, under our names; an error where it has none."""

    def _find_columns(self, header: list[str], where: str) -> dict[str, str]:
        """Our field to the column of each of them.

        Raises:
            ConfigError: a column is unknown, there twice, or missing.
        """
        own = self.reading.fields
        absent = [theirs for theirs in own.values() if theirs not in header]
        if absent:
            raise self._fault(
                where, f"no column {absent[0]!r}, which fields names; columns are {header!r:.200}"
            )
        ours = {name: name for name in header if self._is_known(name)} | dict(own)
        unknown = [] if own else [name for name in header if name not in ours]
        is_clear = all(header.count(theirs) == 1 for theirs in ours.values())
        content = [name for name in self.columns if name != "id"]
        if unknown or not is_clear or not {*content} & {*ours}:
            raise self._fault(
                where,
                f"columns {header!r:.200}; allowed are {', '.join(self.columns)} and labels.FIELD, "
                f"each once, with {' or '.join(content)} among them; --fields text=NAME,... maps "
                "the file's own names",
            )
        return ours

    def _lines(self) -> Iterator[str]:
        for _, line, is_odd in decoded_lines(self.source):
            self._is_odd |= is_odd
            yield line

    def _post(self, number: int, values: object) -> Post:
        if isinstance(values, RowError):
            raise values
        try:
            row = self.row_type.model_validate(values)
        except ValidationError as error:
            raise RowError(self._explain(error)) from error
        images = row.images or ([row.image] if row.image else [])
        labels = row.labels or {}
        return Post(
            id=str(number if row.id is None else row.id),
            text=(row.text or "").strip(),
            images=tuple(map(self._image, images)),
            labels={field: label for field, label in labels.items() if label},
        )

    def _explain(self, error: ValidationError) -> str:
        first = error.errors(include_url=False)[0]
        ours = ".".join(map(str, first["loc"]))
        field = self.reading.fields.get(ours, ours)
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(Row.model_fields)
            return f"{field!r} is unknown; allowed are {allowed}; remove or rename it"
        if first["type"] == "model_type":
            return f"{first['input']!r:.80} is not an object"
        message = first["msg"].removeprefix("Value error, ")
        return f"{field}={first['input']!r:.80}: {message}" if field else message
