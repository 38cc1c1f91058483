"""JSONL and CSV, a post a row, under our names of fields or under the user's own."""

from __future__ import annotations

import csv
import json
import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serving.errors import ConfigError
from serving.posts.post import Post
from serving.posts.reader import Reading, StreamedPosts
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


class RowPosts(StreamedPosts):
    """Posts of a file with a post a row; image paths are relative to the file.

    Where `Reading.fields` gives the file's own names, fields that it does not name keep ours, and
    all others of the file are left alone. Without it, an unknown field is an error.
    """

    has_own_names = True
    columns: ClassVar[tuple[str, ...]] = ("id", "text", "image")

    def __init__(self, source: Path, reading: Reading) -> None:
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

    def _found(self) -> Iterator[tuple[str, Post]]:
        for number, values in self._rows():
            yield f"line {number}", self._post(number, values)

    @abstractmethod
    def _rows(self) -> Iterator[tuple[int, object]]:
        """Line number and values of each row, under our names."""

    def _lines(self) -> Iterator[str]:
        for _, line, is_odd in decoded_lines(self.source):
            self._is_odd |= is_odd
            yield line

    def _post(self, number: int, values: object) -> Post:
        where = f"line {number}"
        try:
            row = Row.model_validate(values)
        except ValidationError as error:
            raise self._fault(where, self._explain(error)) from error
        images = row.images or ([row.image] if row.image else [])
        labels = row.labels or {}
        return Post(
            id=str(number if row.id is None else row.id),
            text=(row.text or "").strip(),
            images=tuple(self._image(where, image) for image in images),
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


class JsonlPosts(RowPosts):
    """A JSON object a line; a post without id is called by its line number."""

    description = "a .jsonl file of objects with text, image or images, and id, labels if known"
    columns = ("id", "text", "image", "images")

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() in (".jsonl", ".ndjson")

    def _rows(self) -> Iterator[tuple[int, object]]:
        never_met = {*self.reading.fields.values()}
        number = 0
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                values = self._mend(json.loads(line), line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise self._fault(
                    f"line {number}", f"{line.strip()[:80]!r} is not a JSON object ({error})"
                ) from error
            if self.reading.fields and isinstance(values, dict):
                never_met.difference_update(values)
                values = self._under_our_names(values)
            yield number, values
        if number and never_met:
            raise ConfigError(
                f"fields names {min(never_met)!r}, which no row of {self.source.name} has",
                param="fields",
            )

    def _under_our_names(self, row: dict[str, Any]) -> dict[str, Any]:
        fields = self.reading.fields
        values = {name: row[name] for name in Row.model_fields if name in row}
        values |= {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
        named = {name: values.pop(name) for name in fields if "." in name and name in values}
        labels = {} if values.get("labels") is None else values["labels"]
        if named and isinstance(labels, dict):
            own = {name.removeprefix("labels."): label for name, label in named.items()}
            values["labels"] = {**labels, **own}
        return values

    def _mend(self, values: object, line: str) -> object:
        """Half emoji, as left by cutting texts in UTF-16, become question marks and are counted."""
        if r"\ud" not in line.lower():
            return values
        spelled = json.dumps(values, ensure_ascii=False)
        whole = spelled.encode(errors="replace").decode()
        self._is_odd |= whole != spelled
        return json.loads(whole)


class CsvPosts(RowPosts):
    """Columns id, text, image and labels.FIELD, by commas; an empty cell is a missing value."""

    description = (
        "a .csv file with a header of id, text, image, labels.FIELD (text or image needed)"
    )

    def __init__(self, source: Path, reading: Reading) -> None:
        super().__init__(source, reading)
        self._columns = self._find_columns(next(csv.reader(self._lines()), []))

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() == ".csv"

    def _find_columns(self, header: list[str]) -> dict[str, int]:
        """Place of each of our fields in a row."""
        own = self.reading.fields
        absent = [theirs for theirs in own.values() if theirs not in header]
        if absent:
            raise self._fault(
                "line 1",
                f"no column {absent[0]!r}, which fields names; columns are {header!r:.200}",
            )
        ours = {name: name for name in header if self._is_known(name)} | dict(own)
        unknown = [] if own else [name for name in header if name not in ours]
        is_clear = all(header.count(theirs) == 1 for theirs in ours.values())
        if unknown or not is_clear or not {"text", "image"} & {*ours}:
            raise self._fault(
                "line 1",
                f"columns {header!r:.200}; allowed are id, text, image and labels.FIELD, separated "
                "by commas, each once, with text or image among them; --fields text=NAME,... maps "
                "the file's own names",
            )
        return {name: header.index(theirs) for name, theirs in ours.items()}

    def _rows(self) -> Iterator[tuple[int, object]]:
        reader = csv.reader(self._lines(), strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if header is None:
                    header, self._is_odd = cells, False
                elif cells:
                    yield reader.line_num, self._values(reader.line_num, header, cells)
        except csv.Error as error:
            raise self._fault(f"line {reader.line_num}", f"is not CSV: {error}") from error

    def _values(self, number: int, header: list[str], cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(header):
            raise self._fault(f"line {number}", f"{len(cells)} cells, the header has {len(header)}")
        row = {name: cells[column] for name, column in self._columns.items()}
        values: dict[str, Any] = {name: row[name] for name in ("text", "image") if name in row}
        labels = {name.removeprefix("labels."): row[name] for name in row if "." in name}
        return {**values, "id": row.get("id") or None, "labels": labels}
