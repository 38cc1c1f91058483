"""The story that all studies share: arms over seeds, cells, comparisons, findings."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from serving.posts import Post
from serving.structures import LabelStructure
from train.baselines import majority
from train.fit import Material, open_run
from train.metrics import Marked
from train.recipes import Recipe, change_recipe
from train.studies.catalog import STUDIES
from train.studies.cells import Cell, Result, run_cells
from train.studies.findings import Findings, arm_row, conclude, mean_and_std
from train.studies.lab import Lab, as_answers, mark_answers
from train.studies.report import write_report
from train.studies.setup import Setup
from train.studies.spread import Figures, compare, summarize_seeds

Results = Mapping[str, Result]


class Study(ABC):
    """What one study trains, asks and concludes.

    Raises:
        ConfigError: (where it is made) the setup does not fit the study.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.lab = Lab(setup)

    def facts(self) -> dict[str, Any]:
        """What else than the setup makes two studies the same, ready for JSON."""
        return {}

    @abstractmethod
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they run."""

    @abstractmethod
    def find(self, results: Results) -> Findings:
        """What the cells' results come to."""

    @property
    def posts(self) -> Sequence[Post]:
        """Posts that are answered."""
        return self.setup.material.dev

    def train_cell(
        self,
        arm: str,
        seed: int,
        recipe: Recipe,
        *,
        structure: LabelStructure | None = None,
        material: Material | None = None,
        base: Any = None,
    ) -> Cell:
        """A training of an arm with a seed."""
        name = run_name(arm, seed)
        work = partial(
            self.lab.train,
            name,
            change_recipe(recipe, {"seed": seed}),
            structure or self.setup.structure,
            material or self.setup.material,
            base=base,
        )
        return Cell(name=name, kind="training", work=work)

    def ask_cell(
        self,
        name: str,
        run: str | None,
        *,
        structure: LabelStructure | None = None,
        posts: Sequence[Post] | None = None,
        **how: Any,
    ) -> Cell:
        """An evaluation of a run's adapter, or of the base alone."""
        work = partial(
            self.lab.ask,
            structure or self.setup.structure,
            self.posts if posts is None else posts,
            run=run,
            **how,
        )
        return Cell(name=name, kind="evaluation", work=work)

    def marked(
        self,
        result: Result,
        field: str | None = None,
        *,
        structure: LabelStructure | None = None,
        posts: Sequence[Post] | None = None,
    ) -> Marked:
        """An evaluation's answers in a field, the one that counts by default."""
        posts = self.posts if posts is None else posts
        marked = mark_answers(structure or self.setup.structure, posts, result)
        return marked[field or self.setup.field]

    def over_seeds(self, results: Results, arm: str, field: str | None = None) -> list[Marked]:
        """An arm's answers, one a seed."""
        return [
            self.marked(results[ask_name(arm, seed)], field, structure=self.structure_of(arm))
            for seed in self.setup.seeds
        ]

    def structure_of(self, arm: str) -> LabelStructure:
        """What an arm is asked."""
        return self.setup.structure

    def majority(self, field: str | None = None) -> Marked:
        """The most frequent training label."""
        structure, material = self.setup.structure, self.setup.material
        found = majority(structure, material.train, self.posts)
        return self.marked(as_answers(found), field)


def run_name(arm: str, seed: int) -> str:
    """Name of a training's cell and run folder."""
    return f"train-{arm}-seed{seed}".replace(" ", "-").replace("%", "")


def ask_name(arm: str, seed: int) -> str:
    """Name of the cell that evaluates it."""
    return f"ask-{arm}-seed{seed}".replace(" ", "-").replace("%", "")


def compare_arms(
    study: Study,
    arms: Mapping[str, Sequence[Marked]],
    alone: Mapping[str, Marked],
    against: Sequence[tuple[str, str]],
) -> tuple[Figures, list[list[object]], list[str]]:
    """Arms over seeds, what stands beside them, and the pairs that meet.

    Returns:
        The figures, rows for a table of all of them, and a line a pair.
    """
    spread = {name: summarize_seeds(one) for name, one in arms.items()}
    beside = {name: summarize_seeds([one]) for name, one in alone.items()}
    compared = {f"{one} - {other}": compare(arms[one], arms[other]) for one, other in against}
    figures = {"arms": spread, "beside": beside, "comparisons": compared}
    rows = [arm_row(name, one) for name, one in (spread | beside).items()]
    lines = [conclude(one, other, compared[f"{one} - {other}"]) for one, other in against]
    return figures, rows, lines


def training_facts(results: Results, arm: str, seeds: Sequence[int]) -> tuple[int, str]:
    """Trainable parameters of an arm, and its seconds over seeds."""
    runs = [results[run_name(arm, seed)] for seed in seeds]
    seconds = [run["training_seconds"] for run in runs]
    return int(runs[0]["trainable_parameters"]), mean_and_std(seconds, digits=1)


def make_study(setup: Setup) -> Study:
    """The study of the setup's name; its module is `train.studies.NAME`."""
    assert setup.study in STUDIES
    study: Study = importlib.import_module(f"train.studies.{setup.study}").STUDY(setup)
    return study


def run_study(study: Study, *, fresh: bool = False) -> dict[str, Any]:
    """Runs the cells that are missing and writes the report; its content.

    Raises:
        ConfigError: the folder holds a study with another configuration, or a cell cannot be run.
    """
    setup = study.setup
    configuration = json.loads(json.dumps({**setup.describe(), **study.facts()}))
    open_run(setup.out, configuration, fresh=fresh)
    results = run_cells(study.cells(), setup.out / "cells")
    return write_report(setup, configuration, study.find(results), results)
