"""Figures over seeds, and two models compared over seeds, on the same posts.

Letters: N posts, S seeds, R resamples, U distinct combinations of truth and all answers.

Two sources of chance are kept apart. The standard deviation is over seeds: weights drawn, order,
dropout. The interval is over posts: a bootstrap resample draws posts once and takes the mean over
seeds on them. McNemar's test needs each post once: it is given the label that most seeds answered.
Adding the seeds' disagreements up instead would count every post S times and make chance look
significant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from train.metrics import METRICS, Marked, measure
from train.significance import NUM_RESAMPLES, _draw, _estimate, _scores, mcnemar

Figures = dict[str, Any]


def summarize_seeds(marked: Sequence[Marked]) -> Figures:
    """Mean and standard deviation over seeds of each figure, and the figures by seed."""
    measured = [measure(one) for one in marked]
    return {name: describe([one[name] for one in measured]) for name in METRICS}


def describe(values: Sequence[float]) -> Figures:
    """Mean, sample standard deviation (None of one value), and the values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "by_seed": [float(v) for v in values]}


def vote(marked: Sequence[Marked]) -> Marked:
    """Each post with the label that most seeds answered; of those as frequent, the first seed's."""
    guessed = np.stack([one.guessed for one in marked])  # (S, N)
    counts = (guessed[:, None] == guessed[None]).sum(axis=1)  # how many seeds agree, (S, N)
    chosen = guessed[counts.argmax(axis=0), np.arange(guessed.shape[1])]
    return replace(marked[0], guessed=chosen, confidence=np.empty(0))


def compare(
    first: Sequence[Marked],
    second: Sequence[Marked],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Figures:
    """First minus second, both over seeds, on the same posts.

    Args:
        first: one a seed.
        second: one a seed in the same order, or a single one that has no seed.
        seed: of the bootstrap.
        num_resamples: R.

    Returns:
        `difference`: by figure `value` (mean over seeds), the 95 % interval `low` to `high` over
        posts, `std` over seeds and `by_seed`; `mcnemar` of the voted answers and `by_seed`.
    """
    others = list(second) * (len(first) if len(second) == 1 else 1)
    assert len(first) == len(others), "two models over other seeds"
    assert all(one.ids == first[0].ids for one in [*first, *others]), "answers to other posts"
    measured = [(measure(one), measure(other)) for one, other in zip(first, others, strict=True)]
    intervals = _bootstrap(first, second, seed, num_resamples)
    difference = {}
    for name in METRICS:
        seeds = describe([one[name] - other[name] for one, other in measured])
        difference[name] = {**intervals[name], "std": seeds["std"], "by_seed": seeds["by_seed"]}
    return {
        "difference": difference,
        "mcnemar": {
            **asdict(mcnemar(vote(first), vote(second))),
            "by_seed": [asdict(mcnemar(a, b)) for a, b in zip(first, others, strict=True)],
        },
    }


def _bootstrap(
    first: Sequence[Marked], second: Sequence[Marked], seed: int, num_resamples: int
) -> dict[str, Figures]:
    """The difference of means over seeds, with its interval over posts."""
    rows = [first[0].true, *(one.guessed for one in first), *(one.guessed for one in second)]
    combos, counts = np.unique(np.stack(rows), axis=1, return_counts=True)
    num_labels = len(first[0].labels)

    def mean(weights: np.ndarray, answers: np.ndarray) -> Figures:
        scores = [_scores(weights, combos[0], guessed, num_labels) for guessed in answers]
        return {name: np.mean([one[name] for one in scores], axis=0) for name in METRICS}

    def difference(weights: np.ndarray) -> Figures:
        one = mean(weights, combos[1 : 1 + len(first)])
        other = mean(weights, combos[1 + len(first) :])
        return {name: one[name] - other[name] for name in METRICS}

    value, drawn = difference(counts[None]), difference(_draw(counts, seed, num_resamples))
    return {name: asdict(_estimate(value[name], drawn[name])) for name in METRICS}
