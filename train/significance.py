"""How sure a figure is: bootstrap intervals, plain and paired, and McNemar's exact test.

Letters: N posts, C labels, R resamples, U distinct combinations of true and answered labels.

A bootstrap resample draws N posts with replacement. Figures here depend only on how often each
combination of (true, answered) occurs, and those counts are multinomial: drawing them directly is
the same distribution as drawing posts, and costs `(R, U)` numbers however many posts there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from train.metrics import METRICS, Marked

NUM_RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with the ends of its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """The exact test of two models that answered the same posts.

    Attributes:
        only_first: posts that only the first got right.
        only_second: posts that only the second got right.
        p_value: of so uneven a split, or more, if both were equally good (two-sided).
    """

    only_first: int
    only_second: int
    p_value: float


def estimate(
    marked: Marked, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Estimate]:
    """Accuracy, macro-F1 and weighted F1 with their intervals."""
    combos, counts = np.unique(np.stack([marked.true, marked.guessed]), axis=1, return_counts=True)
    value = _scores(counts[None], combos[0], combos[1], len(marked.labels))
    drawn = _scores(_draw(counts, seed, num_resamples), combos[0], combos[1], len(marked.labels))
    return {name: _estimate(value[name], drawn[name]) for name in METRICS}


def estimate_difference(
    first: Marked, second: Marked, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Estimate]:
    """First minus second of each figure; a resample draws the same posts for both.

    Both must have answered the same posts, in the same order.
    """
    _check_same_posts(first, second)
    combos, counts = np.unique(
        np.stack([first.true, first.guessed, second.guessed]), axis=1, return_counts=True
    )
    num_labels = len(first.labels)

    def difference(weights: np.ndarray) -> Mapping[str, np.ndarray]:
        one = _scores(weights, combos[0], combos[1], num_labels)
        other = _scores(weights, combos[0], combos[2], num_labels)
        return {name: one[name] - other[name] for name in METRICS}

    value, drawn = difference(counts[None]), difference(_draw(counts, seed, num_resamples))
    return {name: _estimate(value[name], drawn[name]) for name in METRICS}


def mcnemar(first: Marked, second: Marked) -> McNemar:
    """McNemar's exact test (McNemar, 1947; the binomial form) on the same posts."""
    _check_same_posts(first, second)
    one, other = first.guessed == first.true, second.guessed == second.true
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differing = only_first + only_second
    p_value = binomtest(only_first, differing, 0.5).pvalue if differing else 1.0
    return McNemar(only_first=only_first, only_second=only_second, p_value=float(p_value))


def _check_same_posts(first: Marked, second: Marked) -> None:
    assert first.ids == second.ids, "a paired comparison needs the same posts in the same order"
    assert first.labels == second.labels, "a paired comparison needs the same labels"


def _draw(counts: np.ndarray, seed: int, num_resamples: int) -> np.ndarray:
    """`(R, U)` counts of a bootstrap over the posts that `counts` `(U,)` sums up."""
    total = int(counts.sum())
    return np.random.default_rng(seed).multinomial(total, counts / total, size=num_resamples)


def _scores(
    weights: np.ndarray, true: np.ndarray, guessed: np.ndarray, num_labels: int
) -> dict[str, np.ndarray]:
    """Each figure `(R,)` of posts that occur `weights` `(R, U)` times."""
    each = np.arange(num_labels)
    is_true, is_guessed = true[:, None] == each, guessed[:, None] == each
    support = weights @ is_true
    occurs = support + weights @ is_guessed
    f1 = 2 * (weights @ (is_true & is_guessed)) / np.maximum(occurs, 1)
    total = weights.sum(axis=1)
    return {
        "accuracy": weights @ (true == guessed) / total,
        "macro_f1": f1.sum(axis=1) / (occurs > 0).sum(axis=1),
        "weighted_f1": (f1 * support).sum(axis=1) / total,
    }


def _estimate(value: np.ndarray, drawn: np.ndarray) -> Estimate:
    low, high = np.percentile(drawn, _PERCENTILES)
    return Estimate(value=float(value[0]), low=float(low), high=float(high))
