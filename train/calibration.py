"""Whether probabilities mean what they say: expected calibration error and its bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.metrics import Marked

NUM_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Posts whose answered label had a probability in (low, high].

    Attributes:
        count: how many those are, at least one.
        confidence: their mean probability.
        accuracy: the share of them that was right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(marked: Marked) -> list[Bin]:
    """The bins of equal width that have posts; none where the answers had no probabilities."""
    confidence, right = marked.confidence, marked.guessed == marked.true
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    # Float32 probabilities may sum to a hair above 1.
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, NUM_BINS - 1)
    return [
        Bin(
            low=float(edges[place]),
            high=float(edges[place + 1]),
            count=int((places == place).sum()),
            confidence=float(confidence[places == place].mean()),
            accuracy=float(right[places == place].mean()),
        )
        for place in np.unique(places)
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean gap between probability and accuracy, weighted by posts (Guo et al., 2017, eq. 3)."""
    total = sum(item.count for item in bins)
    if total == 0:
        return None
    return sum(item.count * abs(item.accuracy - item.confidence) for item in bins) / total
