"""CSV with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.posts.reader import Reading, RowError
from serving.posts.rows import RowPosts

if TYPE_CHECKING:
    from _csv import Reader


class CsvPosts(RowPosts):
    """Columns id, text, image and labels.FIELD, by commas; an empty cell is a missing value."""

    description = (
        "a .csv file with a header of id, text, image, labels.FIELD (text or image needed)"
    )

    def __init__(self, source: Path, reading: Reading) -> None:
        super().__init__(source, reading)
        header = next(csv.reader(self._lines()), [])
        self._columns, self._num_cells = self._find_columns(header), len(header)

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
        next(reader, None)
        self._is_odd = False
        while (cells := self._cells(reader)) is not None:
            if isinstance(cells, RowError):
                yield reader.line_num, cells
            elif cells:
                yield reader.line_num, self._values(cells)

    def _cells(self, reader: Reader) -> list[str] | RowError | None:
        """The next row; None after the last one. After an error the next line starts a row."""
        first = reader.line_num + 1
        try:
            return next(reader, None)
        except csv.Error as error:
            lines = "" if reader.line_num == first else f", from line {first} on"
            return RowError(f"is not CSV: {error}{lines}")

    def _values(self, cells: list[str]) -> dict[str, Any] | RowError:
        if len(cells) != self._num_cells:
            return RowError(f"{len(cells)} cells, the header has {self._num_cells}")
        row = {name: cells[column] for name, column in self._columns.items()}
        values: dict[str, Any] = {name: row[name] for name in ("text", "image") if name in row}
        labels = {name.removeprefix("labels."): row[name] for name in row if "." in name}
        return {**values, "id": row.get("id") or None, "labels": labels}
