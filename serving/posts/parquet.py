"""Parquet, as data sets are published and as Spark, pandas and Hugging Face write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from serving.posts.places import Place
from serving.posts.reader import Reading, RowError
from serving.posts.rows import Row, RowPosts
from serving.posts.texts import decode

Cell = Any
"""A value of a column: None, a string, a number, bytes, a list or a dictionary."""


class BytesRow(Row):
    """A row whose images may be bytes."""

    image: str | bytes | None = None  # type: ignore[assignment]
    images: list[str | bytes] | None = None  # type: ignore[assignment]


class ParquetPosts(RowPosts):
    """Columns id, text, image, images (a list) and labels.FIELD, read a few MiB at a time.

    An image is bytes, a path, a data URL, or Hugging Face's struct of bytes and path. A post
    without id is called by its row's number, from 1.
    """

    description = "a .parquet file with columns id, text, image, images, labels.FIELD"
    columns = ("id", "text", "image", "images")
    row_type = BytesRow
    row_word = "row"

    def __init__(self, source: Place, reading: Reading) -> None:
        from serving.posts.parquet_file import ParquetFile  # pyarrow takes a while to import

        super().__init__(source, reading)
        self._file = ParquetFile(source)
        self._columns = self._find_columns(self._file.names, "schema")
        for ours, theirs in self._columns.items():
            message = self._file.misfit(ours, theirs)
            if message:
                raise self._fault("schema", message)
        if reading.chosen is None:
            self.num_posts = self._file.num_rows

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return source.suffix.lower() in (".parquet", ".pq") and source.is_file()

    def _rows(self) -> Iterator[tuple[int, object]]:
        for number, cells in enumerate(self._file.rows([*self._columns.values()]), start=1):
            yield number, self._values(dict(zip(self._columns, cells, strict=True)))

    def _values(self, row: dict[str, Cell]) -> object:
        try:
            values = {name: self._value(name, cell) for name, cell in row.items()}
        except RowError as error:
            return error
        labels = {name.removeprefix("labels."): row[name] for name in row if "." in name}
        return {**{name: values[name] for name in values if "." not in name}, "labels": labels}

    def _value(self, name: str, cell: Cell) -> Cell:
        if name == "text" and isinstance(cell, bytes):
            text, is_odd = decode(cell)
            self._is_odd |= is_odd
            return text
        if name == "image":
            return _image(cell)
        if name == "images" and cell is not None:
            return [_listed_image(each) for each in cell]
        return cell


def _image(cell: Cell) -> Cell:
    """Bytes, a path or a data URL; None where there is none."""
    if not isinstance(cell, Mapping):
        return cell
    raw = cell.get("bytes")
    return raw if raw is not None else cell.get("path")


def _listed_image(cell: Cell) -> Cell:
    image = _image(cell)
    if image is None:
        raise RowError("images has a missing one; leave it out of the list")
    return image
