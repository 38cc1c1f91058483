"""From a finished run and its evaluation to the manifest that the server reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import ConfigError
from serving.manifest import ImageMode, Manifest, RetentionPoint, Trained
from serving.structures import LabelStructure

RUN_NAME = "run.json"
EVALUATION_NAME = "evaluation.json"
MARGIN = 0.01
"""Loss of macro-F1 that a recommended ratio may bring."""

_FIGURES = ("accuracy", "macro_f1", "weighted_f1")
_Record = TypeVar("_Record", bound=BaseModel)


class Run(BaseModel):
    """What a manifest needs of `run.json`, which `train.fit` writes; the rest is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    finished: bool
    recipe: str
    label_structure: LabelStructure
    base: Path
    base_fingerprint: str | None
    image_mode: ImageMode
    settings: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    notes: list[str] = Field(default_factory=list)


class Cell(BaseModel):
    """Figures at one selector and ratio."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    selector: str
    ratio: float
    fields: dict[str, dict[str, Any]]


class Evaluated(BaseModel):
    """What a manifest needs of `evaluation.json`, which `train evaluate` writes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    structure: str
    num_posts: int
    cells: list[Cell] = Field(min_length=1)
    shuffled_images: dict[str, Any] | None = None
    conclusions: list[str] = Field(default_factory=list)
    configuration: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_served(self) -> bool:
        """Whether a server was asked; what weights it had is not known then."""
        return "server" in self.configuration


def read_run(folder: Path) -> Run:
    """The record of a finished run.

    Raises:
        ConfigError: the folder is no run, or its training has not finished.
    """
    if not (folder / RUN_NAME).is_file():
        state = "its training has not finished; run the same `train fit` command again"
        if not (folder / "config.json").is_file():
            state = "it is no run folder; name one that `python -m train fit` wrote"
        raise ConfigError(f"{folder} has no {RUN_NAME}: {state}", param="run")
    run = _read(folder / RUN_NAME, Run, "train it again with --fresh")
    if not run.finished:
        raise ConfigError(
            f"{folder}: its training has not finished; run the same `train fit` command again",
            param="run",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / "adapter" / name).is_file():
            raise ConfigError(
                f"{folder}: adapter/{name} is missing; train it again with --fresh", param="run"
            )
    return run


def read_evaluation(folder: Path, run: Run, adapter_fingerprint: str) -> Evaluated:
    """The figures of a run's adapter.

    Raises:
        ConfigError: the folder is no evaluation, or one of another structure or adapter.
    """
    if not (folder / EVALUATION_NAME).is_file():
        raise ConfigError(
            f"--evaluation {folder} has no {EVALUATION_NAME}; name a folder that "
            "`python -m train evaluate` wrote",
            param="evaluation",
        )
    found = _read(folder / EVALUATION_NAME, Evaluated, "evaluate the adapter again")
    if found.structure != run.label_structure.name:
        raise ConfigError(
            f"--evaluation {folder} is of label structure {found.structure!r}, the adapter was "
            f"trained for {run.label_structure.name!r}; evaluate this run's adapter",
            param="evaluation",
        )
    if found.configuration.get("prompt") not in (None, run.label_structure.prompt):
        raise ConfigError(
            f"--evaluation {folder} asked with another prompt than the adapter was trained with; "
            "evaluate it again",
            param="evaluation",
        )
    if (
        not found.is_served
        and found.configuration.get("adapter_fingerprint") != adapter_fingerprint
    ):
        raise ConfigError(
            f"--evaluation {folder} is of another adapter, or of the base alone; evaluate this "
            "run's, RUN/adapter",
            param="evaluation",
        )
    return found


def _read(path: Path, kind: type[_Record], fix: str) -> _Record:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {fix}") from error


def retention_curve(evaluated: Evaluated) -> list[RetentionPoint]:
    """Figures of the last field, which is the one that counts, at every selector and ratio."""
    return [
        RetentionPoint(
            selector=cell.selector,
            ratio=cell.ratio,
            **{name: round(_last(cell)[name], 4) for name in _FIGURES if name in _last(cell)},
        )
        for cell in evaluated.cells
    ]


def _last(cell: Cell) -> dict[str, Any]:
    return cell.fields[list(cell.fields)[-1]]


def recommend(curve: Sequence[RetentionPoint], selector: str, margin: float) -> float:
    """The smallest measured ratio whose macro-F1 is at most `margin` below that at ratio 1.0.

    Raises:
        ConfigError: the selector was not measured, or not at 1.0.
    """
    measured = {
        point.ratio: point.macro_f1
        for point in curve
        if point.selector == selector and point.macro_f1 is not None
    }
    if 1.0 not in measured:
        raise ConfigError(
            f"the evaluation has no macro-F1 of selector {selector!r} at ratio 1.0, only of "
            f"{sorted({(point.selector, point.ratio) for point in curve})}; evaluate with "
            f"--selectors {selector} --ratios 1,0.8,0.4",
            param="selector",
        )
    bar = measured[1.0] - margin - 1e-9
    return min(ratio for ratio, score in measured.items() if score >= bar)


def make_manifest(
    run: Run,
    adapter: Path,
    evaluated: Evaluated | None,
    *,
    selector: str = "cls",
    margin: float = MARGIN,
) -> Manifest:
    """The manifest of a run's adapter.

    Without an evaluation there is no recommended ratio. There is none either where shuffling the
    images did not lower the score: the curve is flat then because images do not count.

    Args:
        run: what was trained.
        adapter: its folder.
        evaluated: how good it is, or None.
        selector: of the recommended ratio.
        margin: see `recommend`.
    """
    values: dict[str, Any] = {
        # Whole, with its prompt: a server whose structure of that name differs refuses it.
        "label_structure": run.label_structure,
        "base_model": run.base.name,
        "base_fingerprint": run.base_fingerprint,
        "image_mode": run.image_mode,
        "recipe": run.recipe,
        "trained": _trained(run, adapter),
        "notes": [*run.notes],
    }
    if evaluated is None:
        values["notes"].append("Not evaluated: no figures, and no recommended retention ratio.")
        return Manifest(**values)
    curve = retention_curve(evaluated)
    ratio = recommend(curve, selector, margin)
    values |= {"selector": selector, "margin": margin, "retention_curve": curve}
    values["quality"] = {
        f"{_split(evaluated)}, r={cell.ratio:g}": _figures(cell)
        for cell in evaluated.cells
        if cell.selector == selector and cell.ratio in (1.0, ratio)
    }
    values["notes"] += evaluated.conclusions
    if evaluated.is_served:
        served = evaluated.configuration.get("model")
        values["notes"].append(f"Evaluated through a server, as its model {served!r}.")
    if (evaluated.shuffled_images or {}).get("lowers_the_score") is False:
        values["notes"].append(
            "No recommended retention ratio: other posts' images did not reliably lower the score."
        )
    else:
        values["retention_ratio"] = ratio
    return Manifest(**values)


def _trained(run: Run, adapter: Path) -> Trained:
    lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    posts = run.data.get("train") or {}
    return Trained(
        data=run.data.get("source"),
        split=(run.data.get("splits") or {}).get("train"),
        num_posts=posts.get("posts"),
        labels=posts.get("labels"),
        num_epochs=run.settings.get("num_epochs"),
        rank=lora.get("r"),
        alpha=lora.get("lora_alpha"),
        seed=run.seed,
    )


def _split(evaluated: Evaluated) -> str:
    names = [evaluated.configuration.get(part) for part in ("data", "split")]
    return ", ".join([*filter(None, names), f"{evaluated.num_posts} posts"])


def _figures(cell: Cell) -> dict[str, float]:
    """Figures of the last field, and every field's accuracy."""
    last = {name: round(_last(cell)[name], 4) for name in _FIGURES if name in _last(cell)}
    fields = {
        f"{name}_accuracy": round(figures["accuracy"], 4)
        for name, figures in cell.fields.items()
        if figures.get("accuracy") is not None
    }
    return {**last, **fields}
