"""The question in other words: what stays of form, score and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from serving.errors import ConfigError
from train.examples import rephrase
from train.metrics import Marked
from train.report.figures import SCORE
from train.studies.cells import Cell, Result
from train.studies.findings import (
    Findings,
    Plot,
    Table,
    conclude,
    conclude_floor,
    macro,
    mean_and_std,
    said,
)
from train.studies.setup import Setup
from train.studies.spread import Figures, compare, describe, summarize_seeds
from train.studies.study import Results, Study, ask_name, run_name

NUM_TRAINED = 5
MIXED, SINGLE = "mixed", "single"
_THREE = (
    "Post: {text}\nSay for the image, for the text and for both together whether the sentiment is "
    "positive, neutral or negative.",
    "{text}\nHow do the image, the text and the whole post feel? Choose positive, neutral or "
    "negative for each.",
    "Read the text and look at the image.\nText: {text}\nLabel image, text and both as positive, "
    "neutral or negative.",
    "Which sentiment has the image, which the text, and which has the post as a whole (positive, "
    "neutral, negative)?\nText: {text}",
    "Text: {text}\nGive three labels, one for the image, one for the text, one for both: positive, "
    "neutral or negative.",
    'A user posted this image with the words "{text}". Is the mood of the image, of the words and '
    "of the two together positive, neutral or negative?",
    "Classify the sentiment of image, text and post. Answers are positive, neutral and negative.\n"
    "Post: {text}",
    "{text}\nimage? text? both? positive, neutral or negative",
    "You rate posts. First the image, then the text, then both: positive, neutral or negative.\n"
    "The text is: {text}",
)
_ONE = (
    "Post: {text}\nSay whether the sentiment of this post is positive, neutral or negative.",
    "{text}\nHow does this post feel? Choose positive, neutral or negative.",
    "Read the text and look at the image.\nText: {text}\nLabel the post as positive, neutral or "
    "negative.",
    "Which sentiment has this post (positive, neutral, negative)?\nText: {text}",
    "Text: {text}\nGive one label for image and text together: positive, neutral or negative.",
    'A user posted this image with the words "{text}". Is the mood positive, neutral or negative?',
    "Classify the sentiment of the post. Answers are positive, neutral and negative.\nPost: {text}",
    "{text}\nsentiment? positive, neutral or negative",
    "You rate posts as positive, neutral or negative.\nThe text is: {text}",
)
PHRASINGS: dict[str, tuple[str, ...]] = {"llavac": _THREE, "multimodal": _ONE, "sentiment": _ONE}
"""By structure, what follows its own prompt, which is the first phrasing; 5 are trained."""


class PromptsStudy(Study):
    """An adapter a seed on 5 phrasings in turns, asked by those and by 5 it never saw."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        others = PHRASINGS.get(setup.structure.name)
        if others is None:
            raise ConfigError(
                f"study prompts has no phrasings of structure {setup.structure.name!r}; it has "
                f"those of {', '.join(PHRASINGS)}; add yours to train/studies/prompts.py",
                param="recipe",
            )
        self._prompts = (setup.structure.prompt, *others)
        self._structures = [rephrase(setup.structure, prompt) for prompt in self._prompts]
        self._arms = (MIXED, SINGLE) if setup.options.also_single else (MIXED,)

    def facts(self) -> dict[str, Any]:
        """The phrasings."""
        return {"prompts": list(self._prompts), "num_trained": NUM_TRAINED, "arms": self._arms}

    def cells(self) -> list[Cell]:
        """The base by the first phrasing; then arm by arm a training and all phrasings."""
        cells = [self._ask("ask-base", None, 0)]
        for seed in self.setup.seeds:
            for arm in self._arms:
                prompts = self._prompts[:NUM_TRAINED] if arm == MIXED else ()
                material = replace(self.setup.material, prompts=prompts)
                cells.append(self.train_cell(arm, seed, self.setup.recipe, material=material))
                cells += [
                    self._ask(_cell_name(arm, index, seed), run_name(arm, seed), index)
                    for index in range(len(self._prompts))
                ]
        return cells

    def _ask(self, name: str, run: str | None, index: int) -> Cell:
        structure = self._structures[index]

        def work() -> dict[str, Any]:
            answers = self.lab.ask(structure, self.posts, run=run)
            written = self.lab.write(structure, self.posts, run=run)
            formed = sum(structure.parse(text) is not None for text in written)
            return {**answers, "well_formed": formed / len(written), "written": written[:5]}

        return Cell(name=name, kind="evaluation", work=work)

    def find(self, results: Results) -> Findings:
        """Validity, score and flips by phrasing."""
        majority = summarize_seeds([self.majority()])
        base = results["ask-base"]
        figures: Figures = {"phrasings": {}, "summary": {}, "comparisons": {}}
        rows, summary, lines, floor = [], [], [], []
        for arm in self._arms:
            measured = self._measure_arm(results, arm)
            figures["phrasings"][arm] = measured
            rows += [_row(arm, index, one) for index, one in enumerate(measured)]
            groups = {
                "trained": measured[: NUM_TRAINED if arm == MIXED else 1],
                "held out": measured[NUM_TRAINED:],
            }
            figures["summary"][arm] = {name: _summarize(one) for name, one in groups.items()}
            for name, one in figures["summary"][arm].items():
                columns = ("well_formed", "accuracy", SCORE, "flips")
                shown = [said(one[column]) if one[column] else None for column in columns]
                summary.append([f"{arm}, {name}", *shown])
            floor += conclude_floor({arm: measured[0]["figures"]}, majority)
            lines.append(_conclude_arm(arm, figures["summary"][arm]))
        if SINGLE in self._arms:
            both = {arm: self._held_out(results, arm) for arm in self._arms}
            figures["comparisons"] = {
                f"phrasing {index + 1}": compare(both[MIXED][index], both[SINGLE][index])
                for index in both[MIXED]
            }
            lines += [
                f"Phrasing {index + 1}, which neither was trained on: "
                + conclude(MIXED, SINGLE, figures["comparisons"][f"phrasing {index + 1}"])
                for index in both[MIXED]
            ]
        beside = [
            ["zero-shot base, phrasing 1", f"{base['well_formed']:.3f}", *_plain(self.marked(base))]
        ]
        beside.append(["majority", None, *_plain(self.majority())])
        figures["beside"] = {
            "zero-shot base": {
                **summarize_seeds([self.marked(base)]),
                "well_formed": base["well_formed"],
            },
            "majority": majority,
        }
        num_pairs = (len(self._prompts) - 1) * len(self._arms) + len(figures["comparisons"])
        return Findings(
            question="An adapter a seed on 5 phrasings of the prompt that take turns over the "
            "training posts (`mixed`)"
            + (", and one on the first phrasing alone (`single`)" if len(self._arms) > 1 else "")
            + "; each is asked by these and by 5 held-out ones.",
            tables=[
                Table(
                    title="Trained and held-out phrasings",
                    headers=_SUMMARY_HEADERS,
                    rows=[*summary, *beside],
                    legend="A row of an adapter is the mean over its phrasings, ± over seeds. "
                    "Trained flips leave phrasing 1 out, which they are counted against. Held out "
                    f"are phrasings {NUM_TRAINED + 1} to {len(self._prompts)}, for every adapter.",
                ),
                Table(title="By phrasing", headers=_HEADERS, rows=rows, legend=_LEGEND),
                Table(
                    title="The phrasings",
                    headers=["number", "prompt"],
                    rows=[[i + 1, prompt] for i, prompt in enumerate(self._prompts)],
                ),
            ],
            conclusions=[*lines, *floor],
            limits=[
                "The held-out phrasings were written by the same hand as the trained ones and use "
                "many of their words; a user's own question may be further away.",
                "Score and flips are under the label constraint, as served; only the share of "
                "well-formed answers is without it.",
            ],
            figures=figures,
            plots=[self._plot(figures)],
            num_comparisons=num_pairs,
        )

    def _measure_arm(self, results: Results, arm: str) -> list[Figures]:
        """Figures of each phrasing over seeds."""
        first = self._marked_over_seeds(results, arm, 0)
        measured = []
        for index in range(len(self._prompts)):
            cells = [results[_cell_name(arm, index, seed)] for seed in self.setup.seeds]
            marked = self._marked_over_seeds(results, arm, index)
            flips = [self._flip_rate(results, arm, index, seed) for seed in self.setup.seeds]
            measured.append(
                {
                    "trained": index < (NUM_TRAINED if arm == MIXED else 1),
                    "figures": summarize_seeds(marked),
                    "well_formed": describe([cell["well_formed"] for cell in cells]),
                    "flips": describe(flips) if index else None,
                    "to_first": compare(marked, first) if index else None,
                }
            )
        return measured

    def _flip_rate(self, results: Results, arm: str, index: int, seed: int) -> float:
        field = self.setup.field
        first, other = (results[_cell_name(arm, i, seed)] for i in (0, index))
        return count_flips(first, other, field) / len(self.posts)

    def _marked_over_seeds(self, results: Results, arm: str, index: int) -> list[Marked]:
        return [self.marked(results[_cell_name(arm, index, seed)]) for seed in self.setup.seeds]

    def _held_out(self, results: Results, arm: str) -> dict[int, list[Marked]]:
        held_out = range(NUM_TRAINED, len(self._prompts))
        return {index: self._marked_over_seeds(results, arm, index) for index in held_out}

    def _plot(self, figures: Figures) -> Plot:
        lines = {}
        for arm, measured in figures["phrasings"].items():
            for key, name in ((SCORE, "macro-F1"), ("well_formed", "well formed, no constraint")):
                spreads = [one["figures"][key] if key == SCORE else one[key] for one in measured]
                lines[f"{arm}: {name}"] = [
                    (str(index + 1), one["mean"], one["std"]) for index, one in enumerate(spreads)
                ]
        return Plot(
            name="prompts",
            across=f"phrasing (1 to {NUM_TRAINED} trained by `mixed`)",
            up="share",
            lines=lines,
            levels={"majority, macro-F1": figures["beside"]["majority"][SCORE]["mean"]},
        )


_SUMMARY_HEADERS = ("answers of", "well formed", "accuracy", "macro-F1", "flips")
_HEADERS = (
    "phrasing",
    "trained",
    "well formed",
    "accuracy",
    "macro-F1",
    "flips",
    "to phrasing 1, macro-F1",
    "McNemar p",
)
_LEGEND = (
    "Well formed: share of answers that are allowed ones though nothing constrains them. Flips: "
    "share of posts whose label, of the field that counts, is another than by phrasing 1."
)


def count_flips(first: Result, other: Result, field: str) -> int:
    """Posts whose label in a field is another."""
    one, two = np.array(first["answers"][field]), np.array(other["answers"][field])
    return int((one != two).sum())


def _cell_name(arm: str, index: int, seed: int) -> str:
    return ask_name(f"{arm}-phrasing{index + 1}", seed)


def _summarize(measured: Sequence[Figures]) -> Figures:
    """Mean over phrasings, seed by seed."""

    def over_phrasings(spreads: Sequence[Figures]) -> Figures:
        return describe(list(np.mean([one["by_seed"] for one in spreads], axis=0)))

    found = {
        metric: over_phrasings([one["figures"][metric] for one in measured])
        for metric in ("accuracy", SCORE, "weighted_f1")
    }
    found["well_formed"] = over_phrasings([one["well_formed"] for one in measured])
    counted = [one["flips"] for one in measured if one["flips"]]
    return {**found, "flips": over_phrasings(counted) if counted else None}


def _row(arm: str, index: int, one: Figures) -> list[object]:
    compared = one["to_first"]
    return [
        f"{arm}, {index + 1}",
        "yes" if one["trained"] else "no",
        said(one["well_formed"]),
        said(one["figures"]["accuracy"]),
        said(one["figures"][SCORE]),
        said(one["flips"]) if compared else None,
        macro(compared) if compared else None,
        f"{compared['mcnemar']['p_value']:.2g}" if compared else None,
    ]


def _plain(marked: Marked) -> list[object]:
    spread = summarize_seeds([marked])
    return [said(spread["accuracy"]), said(spread[SCORE]), None]


def _conclude_arm(arm: str, summary: Figures) -> str:
    trained, held_out = summary["trained"], summary["held out"]
    lost = [
        one - other
        for one, other in zip(trained[SCORE]["by_seed"], held_out[SCORE]["by_seed"], strict=True)
    ]
    return (
        f"`{arm}`: from trained to held-out phrasings macro-F1 falls by {mean_and_std(lost)} (from "
        f"{said(trained[SCORE])} to {said(held_out[SCORE])}); unconstrained, "
        f"{trained['well_formed']['mean']:.1%} and {held_out['well_formed']['mean']:.1%} of the "
        f"answers are well formed; of posts, {held_out['flips']['mean']:.1%} get another label by "
        "a held-out phrasing than by phrasing 1"
    )


STUDY = PromptsStudy
