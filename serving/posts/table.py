"""CSV with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from serving.posts.places import Place
from serving.posts.reader import Reading, RowError
from serving.posts.rows import RowPosts

if TYPE_CHECKING:
    from _csv import Reader


class CsvPosts(RowPosts):
    """Columns id, text, image and labels.FIELD, by commas; an empty cell is a missing value."""

    description = (
        "a .csv file, by commas, with a header of id, text, image, labels.FIELD (text or image "
        "needed)"
    )

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        header = next(csv.reader(self._lines()), [])
        columns = self._find_columns(header, "line 1")
        self._columns = {ours: header.index(theirs) for ours, theirs in columns.items()}
        self._num_cells = len(header)

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() == ".csv"

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
