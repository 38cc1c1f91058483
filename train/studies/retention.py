"""Which visual tokens may go, and how many: every selector at every ratio, crop and pad."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from serving.errors import ConfigError
from train.evaluation import Plan
from train.metrics import Marked
from train.report.figures import SCORE, conclude_shuffled
from train.report.tables import as_difference
from train.studies.cells import Cell
from train.studies.findings import (
    ARM_HEADERS,
    Findings,
    Plot,
    Table,
    arm_row,
    conclude,
    conclude_floor,
    direction,
    macro,
    mean_and_std,
    p_value,
    point,
    said,
)
from train.studies.setup import IMAGE_MODES, Setup, describe_base
from train.studies.spread import Figures, compare, summarize_seeds
from train.studies.study import Results, Study, run_name

CONTROLS = ("random", "stride")


class RetentionStudy(Study):
    """An adapter a seed and base, asked at every selector and ratio."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        options = setup.options
        selectors = tuple(dict.fromkeys((*options.selectors, *CONTROLS)))
        self._plan = Plan(ratios=options.ratios, selectors=selectors)
        self._bases: dict[str, Path] = {}
        for base in (setup.base, options.also_base):
            if base is None:
                continue
            mode = describe_base(base)["image_mode"]
            if mode in self._bases:
                raise ConfigError(
                    f"--also-base {base} has the image mode {mode!r}, as --base has; name one "
                    "that does the other: crop or pad",
                    param="also_base",
                )
            self._bases[mode] = base

    def facts(self) -> dict[str, Any]:
        """Ratios, selectors, and both bases."""
        return {
            "ratios": list(self._plan.ratios),
            "selectors": list(self._plan.selectors),
            "bases": {mode: describe_base(base) for mode, base in self._bases.items()},
        }

    @property
    def _pairs(self) -> list[tuple[str, float]]:
        """Selector and ratio of every evaluation that drops tokens."""
        ratios = [ratio for ratio in self._plan.ratios if ratio < 1]
        return [(selector, ratio) for selector in self._plan.selectors for ratio in ratios]

    @cached_property
    def _can_shuffle(self) -> bool:
        return sum(bool(post.images) for post in self.posts) > 1

    def cells(self) -> list[Cell]:
        """Base by base and seed by seed: a training, all tokens, the control, all pairs."""
        cells = []
        for mode, base in self._bases.items():
            cells.append(self.ask_cell(f"ask-base-{mode}", None, base=base))
            for seed in self.setup.seeds:
                run = run_name(mode, seed)
                cells.append(self.train_cell(mode, seed, self.setup.recipe, base=base))
                cells.append(self.ask_cell(_name(mode, "whole", seed), run, base=base))
                if self._can_shuffle:
                    name = _name(mode, "shuffled", seed)
                    cells.append(self.ask_cell(name, run, base=base, images="shuffled"))
                for selector, ratio in self._pairs:
                    name = _name(mode, _kept(selector, ratio), seed)
                    how: dict[str, Any] = {"base": base, "selector": selector, "ratio": ratio}
                    cells.append(self.ask_cell(name, run, **how))
        return cells

    def find(self, results: Results) -> Findings:
        """By base: differences to all tokens and to random; then pad against crop."""
        figures: Figures = {"bases": {}}
        tables, lines, plots = [], [], []
        for mode in self._bases:
            one = self._measure(results, mode)
            figures["bases"][mode] = one
            tables.append(self._table(mode, one))
            lines += [f"{mode}: {line}" for line in self._conclude(one)]
            plots.append(self._plot(mode, one))
        num_comparisons = len(self._bases) * (
            2 * len(self._pairs) - len([s for s, _ in self._pairs if s == "random"])
        )
        if {"pad", "crop"} <= self._bases.keys():
            figures["pad_minus_crop"] = self._pad_minus_crop(results)
            tables.append(_pad_table(figures["pad_minus_crop"]))
            lines.append(conclude("pad", "crop", figures["pad_minus_crop"][0]) + ", all tokens")
            num_comparisons += len(figures["pad_minus_crop"])
        tables.append(self._beside_table(figures))
        return Findings(
            question="An adapter a seed"
            + (" and image mode (crop and pad to a square)" if len(self._bases) > 1 else "")
            + f", trained on all visual tokens (ratio {self.setup.recipe.retention_ratio:g}), is "
            f"asked with {', '.join(self._plan.selectors)} at the ratios "
            f"{', '.join(f'{ratio:g}' for ratio in self._plan.ratios)}. The control gives each "
            "text another post's image: where that costs nothing, images do not matter here, and "
            "neither does which of their tokens are kept.",
            tables=tables,
            conclusions=lines,
            limits=[
                "No reliable loss is not no loss: the interval says how much may have been lost.",
                *self._base_limits(),
            ],
            figures=figures,
            plots=plots,
            num_comparisons=num_comparisons,
        )

    def _marked_seeds(self, results: Results, mode: str, what: str) -> list[Marked]:
        return [self.marked(results[_name(mode, what, seed)]) for seed in self.setup.seeds]

    def _measure(self, results: Results, mode: str) -> Figures:
        """Everything of one base."""
        whole = self._marked_seeds(results, mode, "whole")
        cells = []
        for selector, ratio in self._pairs:
            what = _kept(selector, ratio)
            own = self._marked_seeds(results, mode, what)
            first = results[_name(mode, what, self.setup.seeds[0])]
            against = self._marked_seeds(results, mode, _kept("random", ratio))
            cells.append(
                {
                    "selector": selector,
                    "ratio": ratio,
                    "kept_share": first["kept"] / max(1, first["patches"]),
                    "figures": summarize_seeds(own),
                    "to_whole": compare(own, whole),
                    "to_random": None if selector == "random" else compare(own, against),
                }
            )
        return {
            "whole": summarize_seeds(whole),
            "cells": cells,
            "shuffled": self._shuffled(results, mode, whole),
            "zero_shot_base": summarize_seeds([self.marked(results[f"ask-base-{mode}"])]),
            "majority": summarize_seeds([self.majority()]),
        }

    def _shuffled(self, results: Results, mode: str, whole: Sequence[Marked]) -> Figures | None:
        """What another post's images cost, in the form that evaluations report it."""
        if not self._can_shuffle:
            return None
        other = self._marked_seeds(results, mode, "shuffled")
        drop = compare(whole, other)
        return {
            "figures": summarize_seeds(other),
            "drop": drop["difference"],
            "mcnemar": drop["mcnemar"],
            "lowers_the_score": direction(drop["difference"][SCORE]) > 0,
        }

    def _conclude(self, measured: Figures) -> list[str]:
        """The control first: without it, nothing about ratios is concluded."""
        shuffled = measured["shuffled"]
        lines = [
            *conclude_shuffled(shuffled),
            *conclude_floor({"adapter, all tokens": measured["whole"]}, measured["majority"]),
        ]
        if not shuffled or not shuffled["lowers_the_score"]:
            return lines
        for selector in self._plan.selectors:
            cells = [cell for cell in measured["cells"] if cell["selector"] == selector]
            if not cells:
                continue
            lines.append(f"`{selector}` against all tokens: {_split(cells, 'to_whole')}")
            if selector != "random":
                lines.append(f"`{selector}` against `random`: {_split(cells, 'to_random')}")
        return lines

    def _table(self, mode: str, measured: Figures) -> Table:
        rows: list[list[object]] = [
            ["all tokens", "1", "100 %", *_scores(measured["whole"]), None, None, None, None]
        ]
        for cell in measured["cells"]:
            whole, other = cell["to_whole"], cell["to_random"]
            rows.append(
                [
                    cell["selector"],
                    f"{cell['ratio']:g}",
                    f"{cell['kept_share']:.1%}",
                    *_scores(cell["figures"]),
                    macro(whole),
                    p_value(whole),
                    macro(other) if other else None,
                    p_value(other) if other else None,
                ]
            )
        headers = ["selector", "ratio", "kept", "accuracy", "macro-F1"]
        headers += ["to all tokens", "p", "to random", "p (random)"]
        legend = "Differences are of macro-F1 on the same posts, p is McNemar's."
        return Table(
            title=f"{self.setup.field} by selector and ratio, images {IMAGE_MODES[mode]}",
            headers=headers,
            rows=rows,
            legend=legend,
        )

    def _beside_table(self, figures: Figures) -> Table:
        rows = []
        for mode, one in figures["bases"].items():
            rows.append(arm_row(f"adapter, all tokens, {mode}", one["whole"]))
            if one["shuffled"]:
                rows.append(arm_row(f"other posts' images, {mode}", one["shuffled"]["figures"]))
            rows.append(arm_row(f"zero-shot base, {mode}", one["zero_shot_base"]))
        rows.append(arm_row("majority", one["majority"]))
        return Table(title="Beside the adapter", headers=ARM_HEADERS, rows=rows)

    def _plot(self, mode: str, measured: Figures) -> Plot:
        lines = {}
        for selector in self._plan.selectors:
            cells = [cell for cell in measured["cells"] if cell["selector"] == selector]
            points = [point(cell["ratio"], cell["figures"]) for cell in cells]
            lines[selector] = sorted([point(1.0, measured["whole"]), *points])
        levels = {"majority": measured["majority"][SCORE]["mean"]}
        if measured["shuffled"]:
            levels["other posts' images"] = measured["shuffled"]["figures"][SCORE]["mean"]
        levels["zero-shot base"] = measured["zero_shot_base"][SCORE]["mean"]
        return Plot(
            name=f"retention-{mode}",
            across=f"retention ratio, images {IMAGE_MODES[mode]}",
            up=f"macro-F1 of {self.setup.field}",
            lines=lines,
            levels=levels,
        )

    def _pad_minus_crop(self, results: Results) -> list[Figures]:
        """All tokens first, then every selector and ratio."""
        whats = [("all tokens", 1.0, "whole")]
        whats += [(selector, ratio, _kept(selector, ratio)) for selector, ratio in self._pairs]
        return [
            {
                "selector": selector,
                "ratio": ratio,
                **compare(
                    self._marked_seeds(results, "pad", what),
                    self._marked_seeds(results, "crop", what),
                ),
            }
            for selector, ratio, what in whats
        ]

    def _base_limits(self) -> list[str]:
        if len(self._bases) < 2:
            mode = next(iter(self._bases))
            return [f"Images are {IMAGE_MODES[mode]}; the other mode was not run (--also-base)."]
        known = {describe_base(base)["base_fingerprint"] for base in self._bases.values()}
        if len(known) == 1 and None not in known:
            return ["Both bases have the same weights and differ in their image processing."]
        return ["The two bases have other weights too, so pad and crop differ in more than mode."]


def _split(cells: Sequence[Figures], key: str) -> str:
    """At which ratios macro-F1 is reliably higher, lower, or neither."""
    groups: dict[str, list[str]] = {"reliably better": [], "reliably worse": [], "neither": []}
    for cell in cells:
        score = cell[key]["difference"][SCORE]
        kind = {1: "reliably better", -1: "reliably worse", 0: "neither"}[direction(score)]
        groups[kind].append(f"{cell['ratio']:g} ({as_difference(score)})")
    return "; ".join(f"{kind} at {', '.join(found)}" for kind, found in groups.items() if found)


def _pad_table(compared: Sequence[Figures]) -> Table:
    rows = [
        [
            one["selector"],
            f"{one['ratio']:g}",
            macro(one),
            mean_and_std(one["difference"][SCORE]["by_seed"]),
            p_value(one),
        ]
        for one in compared
    ]
    headers = ["selector", "ratio", "pad minus crop, macro-F1", "over seeds", "McNemar p"]
    return Table(title="Pad against crop", headers=headers, rows=rows)


def _scores(spread: Figures) -> list[object]:
    return [said(spread["accuracy"]), said(spread[SCORE])]


def _kept(selector: str, ratio: float) -> str:
    return f"{selector}-{ratio:g}"


def _name(mode: str, what: str, seed: int) -> str:
    return f"ask-{mode}-{what}-seed{seed}"


STUDY = RetentionStudy
