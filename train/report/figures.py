"""What an evaluation comes to: figures, intervals, comparisons and plain conclusions, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from serving.posts import Post
from train.calibration import expected_calibration_error, reliability
from train.evaluation import Cell, Evaluation
from train.metrics import Marked, count_labels, mark, measure
from train.predict import Prediction
from train.significance import Estimate, estimate, estimate_difference, mcnemar

Figures = dict[str, Any]
SCORE = "macro_f1"
"""The figure that conclusions are drawn from, fixed before anything is measured."""


def summarize(evaluation: Evaluation) -> Figures:
    """The content of `evaluation.json`, without the configuration.

    Returns:
        `cells`, one a selector and ratio, with figures by field, kept tokens, and the difference
        to ratio 1.0 and to the selector `random` on the last field; `baselines`, by name the same
        figures; `comparisons` of the model at ratio 1.0 with each baseline on the same posts;
        `shuffled_images`; `well_formed`; `conclusions` in words.
    """
    last = list(evaluation.structure.fields)[-1]
    summary = Summary(evaluation, last)
    shuffled = summary.shuffled()
    comparisons = summary.comparisons()
    return {
        "structure": evaluation.structure.name,
        "field": last,
        "num_posts": len(evaluation.posts),
        "skipped": evaluation.skipped,
        "labels": count_labels(evaluation.structure, evaluation.posts),
        "cells": [summary.cell(cell) for cell in evaluation.cells],
        "baselines": {name: summary.fields(found) for name, found in evaluation.baselines.items()},
        "comparisons": comparisons,
        "shuffled_images": shuffled,
        "well_formed": summary.well_formed(),
        "conclusions": [*conclude_shuffled(shuffled), *_conclude_baselines(comparisons)],
        "notes": list(evaluation.notes),
    }


class Summary:
    """Figures of one evaluation; whatever is compared is compared on the same posts."""

    def __init__(self, evaluation: Evaluation, last: str) -> None:
        self._evaluation, self._last = evaluation, last
        self._posts: Sequence[Post] = evaluation.posts
        self._options = {
            "seed": evaluation.plan.seed,
            "num_resamples": evaluation.plan.num_resamples,
        }
        self._whole = self._mark(evaluation.whole)[last]
        self._fields: dict[int, Figures] = {}

    def fields(self, predictions: Sequence[Prediction]) -> Figures:
        """Figures of every field."""
        key = id(predictions)  # at ratio 1.0 all selectors share one list
        if key not in self._fields:
            marked = self._mark(predictions)
            self._fields[key] = {name: self._measure(one) for name, one in marked.items()}
        return self._fields[key]

    def cell(self, cell: Cell) -> Figures:
        """Figures of one selector and ratio."""
        kept = sum(one.kept for one in cell.predictions)
        patches = sum(one.patches for one in cell.predictions)
        seeing = sum(one.patches > 0 for one in cell.predictions)
        own = self._mark(cell.predictions)[self._last]
        return {
            "selector": cell.selector,
            "ratio": cell.ratio,
            "kept_share": kept / patches if patches else None,
            "kept_tokens": kept / seeing if seeing else None,
            "fields": self.fields(cell.predictions),
            "difference_to_whole": self._difference(own, self._whole),
            "difference_to_random": self._against_random(cell, own),
        }

    def comparisons(self) -> dict[str, Figures]:
        """The model at ratio 1.0 minus each baseline."""
        found = {}
        for name, predictions in self._evaluation.baselines.items():
            other = self._mark(predictions).get(self._last)
            # A baseline that knows less, e.g. no text label, is compared where it answered.
            if other is not None:
                own = self._whole.of(set(other.ids))
                found[name] = {
                    "posts": len(own.ids),
                    "difference": self._difference(own, other),
                    "mcnemar": asdict(mcnemar(own, other)),
                }
        return found

    def shuffled(self) -> Figures | None:
        """What is lost when every post has another's images."""
        if self._evaluation.shuffled is None:
            return None
        other = self._mark(self._evaluation.shuffled)[self._last]
        drop = estimate_difference(self._whole, other, **self._options)
        return {
            "fields": self.fields(self._evaluation.shuffled),
            "drop": _as_dict(drop),
            "mcnemar": asdict(mcnemar(self._whole, other)),
            "lowers_the_score": drop[SCORE].is_above_zero,
        }

    def well_formed(self) -> float | None:
        """Share of answers that are allowed ones though nothing constrained them."""
        written, structure = self._evaluation.written, self._evaluation.structure
        if not written:
            return None
        return sum(structure.parse(text) is not None for text in written) / len(written)

    def _against_random(self, cell: Cell, own: Marked) -> Figures | None:
        if cell.ratio == 1.0 or cell.selector == "random":
            return None
        for other in self._evaluation.cells:
            if other.selector == "random" and other.ratio == cell.ratio:
                return self._difference(own, self._mark(other.predictions)[self._last])
        return None

    def _mark(self, predictions: Sequence[Prediction]) -> dict[str, Marked]:
        return mark(self._evaluation.structure, self._posts, predictions)

    def _measure(self, marked: Marked) -> Figures:
        bins = reliability(marked)
        intervals = {
            f"{name}_interval": [one.low, one.high]
            for name, one in estimate(marked, **self._options).items()
        }
        return {
            **measure(marked),
            **intervals,
            "ece": expected_calibration_error(bins),
            "reliability": [asdict(item) for item in bins],
        }

    def _difference(self, first: Marked, second: Marked) -> Figures:
        return _as_dict(estimate_difference(first, second, **self._options))


def _as_dict(estimates: dict[str, Estimate]) -> Figures:
    return {name: asdict(one) for name, one in estimates.items()}


def conclude_shuffled(shuffled: Figures | None) -> list[str]:
    """Whether anything follows for retention from what shuffled images cost."""
    if shuffled is None:
        return ["Images were not shuffled, so nothing is known about what retention costs"]
    drop = shuffled["drop"][SCORE]
    said = f"{_signed(drop['value'])} [{_signed(drop['low'])}, {_signed(drop['high'])}]"
    if shuffled["lowers_the_score"]:
        return [
            f"The model uses its images: with those of other posts macro-F1 drops by {said}, so "
            "the retention curve can be read as one of image content"
        ]
    return [
        "No conclusion on retention can be drawn from this data set and model: with the images of "
        f"other posts macro-F1 does not reliably drop (own minus shuffled {said})"
    ]


def _conclude_baselines(comparisons: dict[str, Figures]) -> list[str]:
    if "tf-idf" not in comparisons:
        return []
    against = comparisons["tf-idf"]
    said = "; ".join(
        f"{name.replace('_', ' ').replace('f1', 'F1')} {_verdict(one)}, {_signed(one['value'])} "
        f"[{_signed(one['low'])}, {_signed(one['high'])}]"
        for name, one in against["difference"].items()
    )
    return [
        "The model against TF-IDF with logistic regression on the same posts: "
        f"{said}; McNemar p = {against['mcnemar']['p_value']:.3g}"
    ]


def _verdict(difference: Figures) -> str:
    """Better or worse only where the whole interval says so."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "not reliably different"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
