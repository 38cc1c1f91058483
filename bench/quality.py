"""Accuracy and macro-F1 of several variants on the same posts, and each one's distance to another.

Posts are drawn with replacement, all variants' answers to a post together, so a difference is that
of the answers and not of the posts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What answers are worth.

    Attributes:
        accuracy: share of equal labels.
        macro_f1: mean F1 of the labels that are known or answered, each counted alike.
        f1_minus_reference: macro-F1 minus that of the reference on the same posts.
    """

    accuracy: Interval
    macro_f1: Interval
    f1_minus_reference: Interval


def qualities(
    known: Sequence[str], answers: Mapping[str, Sequence[str]], reference: str
) -> dict[str, Quality]:
    """Quality of each variant; `known` and every variant's answers are in one order of posts.

    Raises:
        ValueError: no posts, or a variant without an answer for each.
    """
    if not known or any(len(given) != len(known) for given in answers.values()):
        raise ValueError(f"{len(known)} posts; each variant needs an answer to every one")
    names = sorted({*known, *(label for given in answers.values() for label in given)})
    code = {label: index for index, label in enumerate(names)}
    truth = np.array([code[label] for label in known])
    picks = np.random.default_rng(0).integers(0, truth.size, (NUM_DRAWS, truth.size))
    counts = {}
    for variant, given in answers.items():
        cells = truth * len(names) + np.array([code[label] for label in given])
        counts[variant] = _tables(cells, picks, len(names))
    base = _macro_f1(counts[reference])
    return {variant: _quality(tables, base) for variant, tables in counts.items()}


def _quality(tables: NDArray[np.int64], base: NDArray[np.float64]) -> Quality:
    f1 = _macro_f1(tables)
    hits = np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2))
    return Quality(
        accuracy=_interval(hits), macro_f1=_interval(f1), f1_minus_reference=_interval(f1 - base)
    )


def _tables(cells: NDArray[np.int64], picks: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Counts by (draw, known, answered); the first draw is the posts themselves."""
    found = np.empty((1 + len(picks), size * size), np.int64)
    found[0] = np.bincount(cells, minlength=size * size)
    drawn = cells[picks]
    for cell in range(size * size):
        found[1:, cell] = (drawn == cell).sum(axis=1)
    return found.reshape(-1, size, size)


def _macro_f1(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over labels that occur in a draw: F1 = 2 TP / (known + answered)."""
    occurs = tables.sum(axis=1) + tables.sum(axis=2)
    hits = 2 * np.diagonal(tables, axis1=1, axis2=2)
    f1 = np.divide(hits, occurs, out=np.zeros(occurs.shape), where=occurs > 0)
    mean: NDArray[np.float64] = f1.sum(axis=1) / (occurs > 0).sum(axis=1)
    return mean


def _interval(draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws[1:], (2.5, 97.5))
    return Interval(value=float(draws[0]), low=float(low), high=float(high))
