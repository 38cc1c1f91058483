"""Markdown tables, aligned so that they also read well in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned.

    Raises:
        ValueError: a row does not have one cell a header.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"{len(row)} cells under {len(headers)} headers: {row}")
    widths = [
        max(3, *(len(row[i]) for row in [list(headers), *cells])) for i in range(len(headers))
    ]
    rule = [
        "-" * width if column == 0 else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join(_line(row, widths) for row in [headers, rule, *cells])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join([first, *others])} |"


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
