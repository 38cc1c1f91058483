"""Medians and paired ratios with bootstrap intervals, and the order of a paired run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The median of paired ratios.

    Attributes:
        median: over rounds.
        low: lower end of the bootstrap 95 % interval of the median.
        high: its upper end.
        num_rounds: pairs that went in.
    """

    median: float
    low: float
    high: float
    num_rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median(values: Sequence[float]) -> float:
    """The median.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("the median of no values")
    return float(np.median(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Median over rounds of numerator / denominator, each pair from one round.

    Rounds are drawn with replacement, both sides of a pair together, so what a noisy neighbour
    did to a whole round cancels. The draws are seeded: the same samples give the same interval.

    Raises:
        ValueError: no rounds, unequal counts, or a value that is not above zero.
    """
    over, under = np.asarray(numerators, float), np.asarray(denominators, float)
    if over.shape != under.shape or over.ndim != 1 or over.size == 0:
        raise ValueError(f"{over.size} numerators for {under.size} denominators")
    if not (np.all(over > 0) and np.all(under > 0)):
        raise ValueError("ratios need values above zero")
    ratios = over / under
    picks = np.random.default_rng(0).integers(0, ratios.size, (NUM_DRAWS, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return Estimate(
        median=float(np.median(ratios)), low=float(low), high=float(high), num_rounds=ratios.size
    )


@dataclass(frozen=True, kw_only=True)
class Slope:
    """How fast something grows.

    Attributes:
        value: of the line through the blocks' medians, per unit of x.
        low: lower end of the bootstrap 95 % interval.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether no growth is within the interval."""
        return self.low <= 0

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def slope(x: Sequence[float], y: Sequence[float], num_blocks: int = 20) -> Slope:
    """The slope of a line through samples in time.

    Neighbours in time are alike, so samples are put into blocks of equal length, and blocks, not
    samples, are drawn with replacement for the interval.

    Raises:
        ValueError: fewer than three samples, or all at one x.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if xs.shape != ys.shape or xs.size < 3 or np.ptp(xs) == 0:
        raise ValueError(f"{xs.size} samples at {np.unique(xs).size} places make no line")
    blocks = np.array_split(np.argsort(xs), min(num_blocks, xs.size))
    at = np.array([xs[block].mean() for block in blocks])
    level = np.array([np.median(ys[block]) for block in blocks])
    picks = np.random.default_rng(0).integers(0, at.size, (NUM_DRAWS, at.size))
    picks = picks[np.ptp(at[picks], axis=1) > 0]
    low, high = np.percentile(_slopes(at[picks], level[picks]), (2.5, 97.5))
    return Slope(value=float(_slopes(at, level)), low=float(low), high=float(high))


def _slopes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares along the last axis."""
    dx = x - x.mean(axis=-1, keepdims=True)
    over: NDArray[np.float64] = (dx * y).sum(axis=-1) / (dx * dx).sum(axis=-1)
    return over


def interleaved(variants: Sequence[str], num_rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """(round, variant): every variant once a round, in an order drawn anew for each round."""
    rng = np.random.default_rng(seed)
    for round_index in range(num_rounds):
        for position in rng.permutation(len(variants)):
            yield round_index, variants[position]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One timed call or block.

    Attributes:
        round: pairs samples of different variants.
        variant: what ran.
        seconds: wall time.
    """

    round: int
    variant: str
    seconds: float


def by_variant(samples: Sequence[Sample]) -> Mapping[str, list[float]]:
    """Each variant's seconds in the order of rounds.

    Raises:
        ValueError: a round lacks a variant that another one has.
    """
    rounds: dict[str, dict[int, float]] = {}
    for sample in samples:
        rounds.setdefault(sample.variant, {})[sample.round] = sample.seconds
    if len({frozenset(found) for found in rounds.values()}) > 1:
        raise ValueError("rounds are not paired: a variant is missing in some of them")
    return {name: [found[index] for index in sorted(found)] for name, found in rounds.items()}
