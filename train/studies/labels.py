"""Three labels against one: does training on the unimodal labels help the multimodal one?"""

from __future__ import annotations

from typing import Any

from serving.errors import ConfigError
from serving.structures import LabelStructure, find_structure
from train.recipes import Recipe
from train.studies.cells import Cell
from train.studies.findings import ARM_HEADERS, Findings, Plot, Table, conclude_floor, point
from train.studies.setup import Setup
from train.studies.study import Results, Study, ask_name, compare_arms, run_name

FULL, ALONE = "full", "multimodal-only"
MULTIMODAL = "multimodal"


class LabelsStudy(Study):
    """Two arms on the same posts, seeds and settings; only the structure differs."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.field != MULTIMODAL or len(setup.structure.fields) < 2:
            raise ConfigError(
                f"study labels: structure {setup.structure.name!r} has fields "
                f"{list(setup.structure.fields)}; it needs several, {MULTIMODAL!r} the last, as "
                "recipe llavac has",
                param="recipe",
            )
        self._alone = find_structure(setup.structures, MULTIMODAL)

    def structure_of(self, arm: str) -> LabelStructure:
        """All fields, or the last alone."""
        return self.setup.structure if arm in (FULL, "base-" + FULL) else self._alone

    def _recipe_of(self, arm: str) -> Recipe:
        recipe = self.setup.recipe
        if arm == FULL:
            return recipe
        return recipe.model_copy(update={"name": "llavac-mo", "structure": MULTIMODAL})

    def facts(self) -> dict[str, Any]:
        """The other arm's structure."""
        return {"other_structure": self._alone.model_dump(mode="json")}

    def cells(self) -> list[Cell]:
        """The base in both structures, then seed by seed both arms."""
        cells = [
            self.ask_cell(f"ask-base-{arm}", None, structure=self.structure_of(arm))
            for arm in (FULL, ALONE)
        ]
        for seed in self.setup.seeds:
            for arm in (FULL, ALONE):
                structure = self.structure_of(arm)
                cells += [
                    self.train_cell(arm, seed, self._recipe_of(arm), structure=structure),
                    self.ask_cell(ask_name(arm, seed), run_name(arm, seed), structure=structure),
                ]
        return cells

    def find(self, results: Results) -> Findings:
        """The multimodal field of both."""
        arms = {arm: self.over_seeds(results, arm) for arm in (FULL, ALONE)}
        beside = {
            f"zero-shot base, {arm}": self.marked(
                results[f"ask-base-{arm}"], structure=self.structure_of(arm)
            )
            for arm in (FULL, ALONE)
        }
        beside["majority"] = self.majority()
        figures, rows, lines = compare_arms(self, arms, beside, [(FULL, ALONE)])
        floor = conclude_floor(figures["arms"], figures["beside"]["majority"])
        return Findings(
            question="Two adapters a seed on the same posts: one learns to answer the labels of "
            "image, text and post (`full`), one the post's label alone (`multimodal-only`). "
            "Measured is the post's label.",
            tables=[Table(title="The multimodal label", headers=ARM_HEADERS, rows=rows)],
            conclusions=[*lines, *floor],
            limits=[
                "The arms see the same posts as often, but `full` learns from three times as many "
                "answered labels; that is the question, not an oversight."
            ],
            figures=figures,
            plots=[
                Plot(
                    name="labels",
                    across="trained on",
                    up="macro-F1 of multimodal",
                    lines={"adapters": [point(arm, figures["arms"][arm]) for arm in arms]},
                    levels={
                        name: one["macro_f1"]["mean"] for name, one in figures["beside"].items()
                    },
                )
            ],
            num_comparisons=1,
        )


STUDY = LabelsStudy
