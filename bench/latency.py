"""Percentiles that have enough answers behind them, and shares with their Wilson interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SURE = 0.99
Z_95 = 1.959964


@lru_cache
def least_samples(percent: float) -> int:
    """Fewest answers whose second largest is at or above the percentile with 99 % certainty.

    MLPerf's early stopping with one answer to spare: 64 for p90, 662 for p99. Of fewer, a
    percentile says more about the draw than about the server.
    """
    below = percent / 100
    assert 0 < below < 1
    count = 2
    while below**count + count * (1 - below) * below ** (count - 1) > 1 - SURE:
        count += 1
    return count


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """A percentile in milliseconds; None of fewer than `least_samples`."""
    if len(seconds) < least_samples(percent):
        return None
    return 1e3 * float(np.percentile(seconds, percent))


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of a number did something.

    Attributes:
        hits: those that did.
        count: all of them.
    """

    hits: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.count or self.count == 0:
            raise ValueError(f"{self.hits} of {self.count} is no share")

    @property
    def value(self) -> float:
        """The share itself."""
        return self.hits / self.count

    @property
    def low(self) -> float:
        """Lower end of Wilson's 95 % interval."""
        return self._middle() - self._half()

    @property
    def high(self) -> float:
        """Its upper end."""
        return self._middle() + self._half()

    def _middle(self) -> float:
        return (self.value + Z_95**2 / (2 * self.count)) / (1 + Z_95**2 / self.count)

    def _half(self) -> float:
        spread = self.value * (1 - self.value) / self.count + (Z_95 / self.count) ** 2 / 4
        return Z_95 * math.sqrt(spread) / (1 + Z_95**2 / self.count)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
