"""What `bench shape` found: speed-ups beside the model, stock vLLM and the paper, and the goals."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.flops import PAPER_SPEEDUPS, Shape
from bench.outcome import Outcome
from bench.shape_engine import BEFORE, OURS, THEIRS
from bench.statistics import Estimate, Sample, by_variant, median, paired_ratio

GOAL_OF_MODEL = 0.9
GOAL_RATIO = 0.2
GOAL_THREE_LABELS = {"single": 1.6, "saturated": 1.3}
HEADERS = (
    *("load, labels", "ratio", "s a post", "speed-up [95 %]"),
    *("FLOP model", "of the model", "of stock vLLM [95 %]", "of before [95 %]", "goal"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One side at one load, answer and ratio."""

    side: str
    load: str
    answer: str
    ratio: float

    @property
    def name(self) -> str:
        """Of the variant."""
        return f"{self.side}/{self.load}/{self.answer}/{self.ratio:g}"


class Timings:
    """Seconds of every case, paired by round.

    Args:
        samples: of a run.
        concurrency: posts of a saturated block.
    """

    def __init__(self, samples: Sequence[Sample], concurrency: int) -> None:
        self._seconds = by_variant(samples)
        self._posts = {"single": 1, "saturated": concurrency}

    def has(self, case: Case) -> bool:
        """Whether it was measured."""
        return case.name in self._seconds

    def post_s(self, case: Case) -> float:
        """Median seconds a post."""
        return median(self._seconds[case.name]) / self._posts[case.load]

    def over(self, slow: Case, fast: Case) -> Estimate:
        """How many times as long the first takes."""
        return paired_ratio(self._seconds[slow.name], self._seconds[fast.name])


def summarise(
    samples: Sequence[Sample],
    shape: Shape,
    options: argparse.Namespace,
    num_tokens: Mapping[str, int],
    notes: Sequence[str] = (),
) -> Outcome:
    """Measured, modelled and published speed-ups of each load, answer and ratio."""
    timings = Timings(samples, options.concurrency)
    rows: list[list[object]] = []
    results: dict[str, Any] = {}
    for load in options.loads:
        for answer in options.answers:
            for ratio in options.ratios:
                case = Case(side=OURS, load=load, answer=answer, ratio=ratio)
                model = shape.speedup(
                    ratio, text_tokens=options.text_tokens, output_tokens=num_tokens[answer]
                )
                cell = _cell(case, timings, model)
                goal = _goal(case, cell, is_published=_is_published(shape))
                rows.append(_row(case, cell, goal))
                found = results.setdefault(str(ratio), _first(cell, ratio) | {"cells": {}})
                found["cells"][f"{load}/{answer}"] = {**cell, "goal": goal}
    sizes = f"{shape.layers} + {shape.tower_layers - 1} layers"
    return Outcome(
        title=f"{options.shape} shape ({sizes}), {options.text_tokens} text tokens, saturated = "
        f"{options.concurrency} at once, {options.rounds} rounds",
        headers=HEADERS,
        rows=rows,
        notes=[*_notes(shape, options), *notes],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=samples,
    )


def _cell(case: Case, timings: Timings, model: float) -> dict[str, Any]:
    """Numbers of one row; estimates as plain values."""
    full = Case(side=OURS, load=case.load, answer=case.answer, ratio=1.0)
    stock = Case(side=THEIRS, load=case.load, answer=case.answer, ratio=1.0)
    before = replace(case, side=BEFORE)
    one = replace(case, answer="one")
    speedup = timings.over(full, case)
    is_longer = case.answer != "one" and timings.has(one)
    return {
        "s_per_post": timings.post_s(case),
        "posts_per_s": 1 / timings.post_s(case),
        "speedup": vars(speedup),
        "flop_model": model,
        "of_model": speedup.median / model,
        "of_stock": vars(timings.over(stock, case)) if timings.has(stock) else None,
        "of_before": vars(timings.over(before, case)) if timings.has(before) else None,
        "of_one_label": vars(timings.over(case, one)) if is_longer else None,
    }


def _first(cell: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """The numbers of a ratio that stand above its cells: those of the first load and answer."""
    names = ("speedup", "flop_model")
    found = {"median_s": cell["s_per_post"], **{name: cell[name] for name in names}}
    return {**found, "paper": PAPER_SPEEDUPS.get(ratio)}


def _goal(case: Case, cell: Mapping[str, Any], *, is_published: bool) -> str:
    """The goal of a row and whether it is met; empty where it has none."""
    speedup, paper = cell["speedup"]["median"], PAPER_SPEEDUPS.get(case.ratio)
    if case.answer == "one" and case.load == "single" and paper is not None and is_published:
        return f"> {paper:.2f} (paper): {_yes(speedup > paper)}"
    if case.answer == "one" and case.load == "saturated" and case.ratio < 1:
        return f">= {GOAL_OF_MODEL} of the model: {_yes(cell['of_model'] >= GOAL_OF_MODEL)}"
    if case.ratio == GOAL_RATIO and cell["of_one_label"] is not None:
        times, goal = cell["of_one_label"]["median"], GOAL_THREE_LABELS[case.load]
        return f"{times:.2f} <= {goal} x one label: {_yes(times <= goal)}"
    return ""


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "no"


def _row(case: Case, cell: Mapping[str, Any], goal: str) -> list[object]:
    return [
        f"{case.load}, {case.answer}",
        f"{case.ratio:g}",
        f"{cell['s_per_post']:.3f}",
        Estimate(**cell["speedup"]),
        f"{cell['flop_model']:.2f}",
        f"{cell['of_model']:.2f}",
        *(Estimate(**cell[name]) if cell[name] else "" for name in ("of_stock", "of_before")),
        goal,
    ]


def _is_published(shape: Shape) -> bool:
    """Whether the paper's speed-ups are of this shape."""
    return shape == Shape()


def _notes(shape: Shape, options: argparse.Namespace) -> list[str]:
    notes = [
        f"the tower is {shape.tower_flops() / 1e12:.3f} TFLOP an image at every ratio",
        "'of stock vLLM' is stock's time at all patches over ours at the ratio; stock decodes as "
        "many tokens freely, ours under the labels' constraint and with log-probabilities",
    ]
    if _is_published(shape):
        notes.append("paper: Table 4 of 'Towards Robust Multimodal Sentiment Detection with LLaVA'")
    else:
        notes.append(f"not the full LLaVA-1.5-7B shape ({options.shape}): the paper does not apply")
    return notes
