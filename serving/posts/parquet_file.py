"""A Parquet file by pyarrow: its columns, their types, and its rows in bounded batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from serving.errors import ConfigError
from serving.posts.places import Place

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20
_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)
_BYTES = (
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
    types.is_fixed_size_binary,
)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)


class ParquetFile:
    """A file's columns and rows; it is opened anew for each reading.

    Attributes:
        names: of the columns.
        num_rows: how many there are.

    Raises:
        ConfigError: it cannot be read, or is not Parquet.
    """

    def __init__(self, source: Place) -> None:
        self._source = source
        with self._opened() as file:
            self._schema = file.schema_arrow
            self._batch_rows = _batch_rows(file.metadata)
            self.names: list[str] = self._schema.names
            self.num_rows: int = file.metadata.num_rows

    def misfit(self, ours: str, theirs: str) -> str | None:
        """Why a column cannot be our field, None where it can: names it, its type, and ours."""
        kind = self._schema.field(theirs).type
        if ours == "id":
            is_fit, allowed = _is_text(kind) or types.is_integer(kind), "strings or integers"
        elif ours == "image":
            is_fit, allowed = _is_image(kind), "strings, bytes or structs of bytes and path"
        elif ours == "images":
            is_fit = _is(kind, _LISTS) and _is_image(kind.value_type)
            allowed = "lists of strings, of bytes or of structs of bytes and path"
        else:
            is_fit, allowed = _is_text(kind), "strings"
        if is_fit or types.is_null(kind):
            return None
        return f"column {theirs!r} is {kind!s:.120}; {ours} takes {allowed}"

    def rows(self, names: list[str]) -> Iterator[tuple[Any, ...]]:
        """Values of the named columns, row by row, as Python has them.

        Strings that are not UTF-8 come as bytes. A few MiB of rows are in memory at a time,
        and of each column a page, whose size is the writer's choice.

        Raises:
            ConfigError: the file cannot be read any further.
        """
        with self._opened() as file:
            for batch in file.iter_batches(self._batch_rows, columns=names, use_threads=False):
                yield from zip(*(_values(batch.column(name)) for name in names), strict=True)

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with (
                self._source.open("rb") as raw,
                pq.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file,
            ):
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = getattr(error, "strerror", None) or f"{error}"
            raise ConfigError(f"{self._source.name} cannot be read: {reason:.300}") from error


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows of a batch, so that it takes a few MiB where rows hold images."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    most = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return int(min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES / max(1, most))))


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.cast(pa.binary()).as_py()


def _is(kind: pa.DataType, kinds: tuple[Any, ...]) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in (*kinds, types.is_null))


def _is_text(kind: pa.DataType) -> bool:
    return _is(kind, _TEXTS)


def _is_image(kind: pa.DataType) -> bool:
    if not types.is_struct(kind):
        return _is(kind, _TEXTS + _BYTES)
    fields = {field.name: field.type for field in kind}
    raw, path = fields.get("bytes", pa.null()), fields.get("path", pa.null())
    return _is(raw, _BYTES) and _is(path, _TEXTS) and not {"bytes", "path"}.isdisjoint(fields)
