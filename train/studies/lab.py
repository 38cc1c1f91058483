"""What cells do: train an adapter, ask a model. One model is held at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from json import loads
from pathlib import Path
from typing import Any, Literal

from serving.posts import Post
from serving.structures import LabelStructure
from train.fit import Material, fit
from train.metrics import Marked, mark
from train.model import DTYPES, Llava, load_llava
from train.predict import Prediction, predict, write_freely
from train.recipes import Recipe
from train.sight import Sight
from train.studies.cells import Result
from train.studies.setup import Setup


class Lab:
    """Trains and asks on a study's folder and cache."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._held: tuple[tuple[Path, str | None], Llava, Sight] | None = None

    def train(
        self,
        name: str,
        recipe: Recipe,
        structure: LabelStructure,
        material: Material,
        *,
        base: Path | None = None,
    ) -> dict[str, Any]:
        """Trains in `runs/NAME`, or goes on there; the training's facts.

        Where the recipe keeps the last weights, nothing is evaluated on the way: cells do that.
        """
        self._held = None  # its memory is the training's
        run = fit(
            recipe,
            structure,
            replace(material, dev=material.dev if recipe.keep == "best" else ()),
            base=base or self._setup.base,
            out=self._setup.out / "runs" / name,
            cache=self._setup.cache,
        )
        summary = loads((run / "run.json").read_text(encoding="utf-8"))
        facts = {key: summary[key] for key in ("num_steps", "best_step", "trainable_parameters")}
        return {**facts, "training_seconds": summary["seconds_by_stage"]["training"]}

    def ask(
        self,
        structure: LabelStructure,
        posts: Sequence[Post],
        *,
        run: str | None,
        base: Path | None = None,
        ratio: float = 1.0,
        selector: str = "cls",
        images: Literal["own", "none", "shuffled"] = "own",
    ) -> dict[str, Any]:
        """Answers of a run's adapter, or of the base alone, in the posts' order."""
        model, sight = self._open(base or self._setup.base, run)
        found = predict(
            model, structure, posts, sight, ratio=ratio, selector=selector, images=images
        )
        return as_answers(found)

    def write(
        self, structure: LabelStructure, posts: Sequence[Post], *, run: str | None
    ) -> list[str]:
        """What is written without the label constraint."""
        model, sight = self._open(self._setup.base, run)
        return write_freely(model, structure, posts, sight)

    def _open(self, base: Path, run: str | None) -> tuple[Llava, Sight]:
        """Loads a model unless the last cell had the same."""
        if self._held is None or self._held[0] != (base, run):
            self._held = None
            adapter = self._setup.out / "runs" / run / "adapter" if run else None
            model = load_llava(base, adapter, dtype=DTYPES[self._setup.dtype])
            self._held = (base, run), model, Sight(model, self._setup.cache)
        return self._held[1:]


def as_answers(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Answers as a cell keeps them: by field a label a post, and visual tokens."""
    fields = list(predictions[0].labels)
    return {
        "answers": {name: [one.labels[name] for one in predictions] for name in fields},
        "kept": sum(one.kept for one in predictions),
        "patches": sum(one.patches for one in predictions),
    }


def mark_answers(
    structure: LabelStructure, posts: Sequence[Post], result: Result
) -> Mapping[str, Marked]:
    """A cell's answers beside the truth, by field."""
    rows = zip(*result["answers"].values(), strict=True)
    predictions = [
        Prediction(
            id=post.id,
            labels=dict(zip(result["answers"], row, strict=True)),
            probabilities={},
            kept=0,
            patches=0,
        )
        for post, row in zip(posts, rows, strict=True)
    ]
    return mark(structure, posts, predictions)
