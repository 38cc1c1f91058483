"""The cells of a sweep: a retention ratio and a selector each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METHOD = "cls"
"""The selector whose ratios are searched for goodput; the others stand beside it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What all requests of a block ask for.

    Attributes:
        ratio: retention ratio.
        selector: of patches.
    """

    ratio: float
    selector: str

    @property
    def name(self) -> str:
        """For samples and messages."""
        return f"{self.ratio:g}/{self.selector}"

    @property
    def asked(self) -> dict[str, Any]:
        """Fields of `/v1/label`."""
        return {"retention_ratio": self.ratio, "selector": self.selector}


def cells_of(ratios: Sequence[float], selectors: Sequence[str]) -> list[Cell]:
    """Every ratio with every selector; at 1.0 all selectors keep all, so one stands for them."""
    full = [Cell(ratio=1.0, selector=selectors[0])] if 1.0 in ratios else []
    return full + [
        Cell(ratio=ratio, selector=selector)
        for ratio in ratios
        if ratio != 1.0
        for selector in selectors
    ]


def dominated(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of points that another one beats: no worse in both values, better in one."""
    return {
        name
        for name, (x, y) in points.items()
        if any(
            other_x >= x and other_y >= y and (other_x, other_y) != (x, y)
            for other_x, other_y in points.values()
        )
    }
