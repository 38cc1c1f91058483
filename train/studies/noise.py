"""Wrong labels of image and text in training: what they cost on clean posts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from serving.errors import ConfigError
from serving.posts import Post
from serving.structures import LabelStructure
from train.fit import Material
from train.studies.cells import Cell
from train.studies.findings import ARM_HEADERS, Findings, Plot, Table, conclude_floor, point, said
from train.studies.setup import Setup
from train.studies.spread import summarize_seeds
from train.studies.study import Results, Study, ask_name, compare_arms, run_name


class NoiseStudy(Study):
    """An adapter a seed and share of wrong labels in all fields but the last."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._shares = sorted({0.0, *setup.options.shares})
        if not all(0 <= share <= 1 for share in self._shares):
            raise ConfigError(
                f"--shares {list(setup.options.shares)}: a share lies in [0, 1]", param="shares"
            )
        self._fields = list(setup.structure.fields)[:-1]
        if not self._fields or any(len(setup.structure.fields[f]) < 2 for f in self._fields):
            raise ConfigError(
                f"study noise: structure {setup.structure.name!r} has no fields with several "
                f"labels before {setup.field!r}, which stays right; use one like 'llavac'",
                param="recipe",
            )

    def facts(self) -> dict[str, Any]:
        """The shares."""
        return {"shares": self._shares, "flipped_fields": self._fields}

    def cells(self) -> list[Cell]:
        """The base, then seed by seed all shares."""
        cells = [self.ask_cell("ask-base", None)]
        for seed in self.setup.seeds:
            for share in self._shares:
                arm = _arm(share)
                material = self._noisy(share, seed)
                cells += [
                    self.train_cell(arm, seed, self.setup.recipe, material=material),
                    self.ask_cell(ask_name(arm, seed), run_name(arm, seed)),
                ]
        return cells

    def _noisy(self, share: float, seed: int) -> Material:
        material, structure = self.setup.material, self.setup.structure
        posts = flip_labels(structure, material.train, self._fields, share, seed)
        noise = {"flipped_share": share, "flipped_fields": self._fields, "noise_seed": seed}
        return replace(material, train=posts, source={**material.source, **noise})

    def find(self, results: Results) -> Findings:
        """All fields by share; clean against each."""
        clean, *noisy = [_arm(share) for share in self._shares]
        arms = {arm: self.over_seeds(results, arm) for arm in (clean, *noisy)}
        beside = {"zero-shot base": self.marked(results["ask-base"]), "majority": self.majority()}
        figures, rows, lines = compare_arms(self, arms, beside, [(arm, clean) for arm in noisy])
        figures["fields"] = {
            arm: {
                field: summarize_seeds(self.over_seeds(results, arm, field))
                for field in self._fields
            }
            for arm in arms
        }
        field_rows = [
            [arm, *(said(one[f]["macro_f1"]) for f in self._fields)]
            for arm, one in figures["fields"].items()
        ]
        return Findings(
            question=f"An adapter a seed and share: that share of the training posts' labels of "
            f"{' and '.join(self._fields)} is replaced by another label, drawn evenly; the label "
            f"of {self.setup.field} stays. Posts that are answered keep their labels. With one "
            "seed, what is wrong at a smaller share is wrong at a larger one too.",
            tables=[
                Table(title=f"{self.setup.field} by noise", headers=ARM_HEADERS, rows=rows),
                Table(
                    title="The fields whose labels were noisy",
                    headers=["answers of", *(f"{f}, macro-F1" for f in self._fields)],
                    rows=field_rows,
                ),
            ],
            conclusions=[
                *lines,
                *conclude_floor(figures["arms"], figures["beside"]["majority"]),
            ],
            limits=[
                "Wrong labels are drawn evenly; those of people lean towards neighbours and "
                "towards hard posts. The data's own errors come on top, in the answers' truth too."
            ],
            figures=figures,
            plots=[self._plot(figures)],
            num_comparisons=len(noisy),
        )

    def _plot(self, figures: dict[str, Any]) -> Plot:
        lines = {
            self.setup.field: [point(s, figures["arms"][_arm(s)]) for s in self._shares],
            **{
                field: [point(s, figures["fields"][_arm(s)][field]) for s in self._shares]
                for field in self._fields
            },
        }
        levels = {name: one["macro_f1"]["mean"] for name, one in figures["beside"].items()}
        return Plot(
            name="noise",
            across=f"share of wrong labels of {' and '.join(self._fields)} in training",
            up="macro-F1",
            lines=lines,
            levels=levels,
        )


def flip_labels(
    structure: LabelStructure,
    posts: Sequence[Post],
    fields: Sequence[str],
    share: float,
    seed: int,
) -> list[Post]:
    """Posts with a share of their labels replaced by another, field by field.

    Exactly `round(share * N)` posts are changed in each field, independently of the other fields.
    Under one seed a larger share changes the same posts in the same way, and more.
    """
    labels = [dict(post.labels) for post in posts]
    for place, field in enumerate(fields):
        allowed = structure.fields[field]
        rng = np.random.default_rng([seed, place])
        order = rng.permutation(len(posts))
        steps = rng.integers(1, len(allowed), size=len(posts))
        for index in order[: round(share * len(posts))]:
            old = allowed.index(labels[index][field])
            labels[index][field] = allowed[(old + int(steps[index])) % len(allowed)]
    return [replace(post, labels=new) for post, new in zip(posts, labels, strict=True)]


def _arm(share: float) -> str:
    return f"noise {share * 100:g}%"


STUDY = NoiseStudy
