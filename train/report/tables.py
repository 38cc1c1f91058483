"""Markdown tables, aligned so that they also read well in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned.

    Numbers get three decimals, None a dash.

    Raises:
        ValueError: a row does not have one cell a header.
    """
    cells = [[as_cell(value) for value in row] for row in rows]
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


def as_cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def with_interval(value: float, interval: Sequence[float]) -> str:
    """A figure and its 95 % interval, e.g. `0.612 [0.561, 0.660]`."""
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def as_difference(estimate: Mapping[str, Any] | None) -> str | None:
    """A signed difference and its 95 % interval, e.g. `-0.012 [-0.040, +0.015]`."""
    if estimate is None:
        return None
    return f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join([first, *others])} |"
