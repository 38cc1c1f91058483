"""From posts to an adapter: the story of one training."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import set_seed

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.manifest import fingerprint, read_image_mode
from serving.posts import Post
from serving.structures import LabelStructure
from train.examples import Examples, check_labels
from train.files import write_json
from train.loop import AnswerTrainer, last_checkpoint, take_best
from train.lora import add_lora, save_lora
from train.model import DTYPES, Llava, load_llava
from train.recipes import Recipe
from train.sight import Sight
from train.student import Student

CACHE_BYTES = 50e9  # `cache: auto` keeps features on disk up to here


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an adapter is trained on.

    Attributes:
        train: posts with a label in every field of the structure.
        dev: posts to evaluate on, may be empty.
        prompts: phrasings of the structure's prompt that take turns over the training posts; none
            stands for the structure's own.
        source: names for people: data set, splits, posts that were left out.
    """

    train: Sequence[Post]
    dev: Sequence[Post]
    prompts: Sequence[str] = ()
    source: dict[str, Any] = field(default_factory=dict)


class Stages:
    """Seconds of a run by stage, in the order they came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """What ran since the last end was this stage."""
        now = time.perf_counter()
        self.seconds[stage], self._since = round(now - self._since, 3), now


def fit(
    recipe: Recipe,
    structure: LabelStructure,
    material: Material,
    *,
    base: Path,
    out: Path,
    cache: Path | None = None,
    fresh: bool = False,
) -> Path:
    """Trains an adapter, or goes on where a stopped run was; returns its folder.

    `out` becomes a run folder: `config.json`, `log.jsonl`, `tensorboard/`, `checkpoints/`, and,
    when it is finished, `adapter/` and `run.json`.

    Raises:
        ConfigError: `out` holds a run with another config, posts cannot be trained on, or the
            disk is full.
    """
    stages = Stages()
    check_selector(recipe)
    if recipe.projector == "full":
        raise ConfigError(
            "projector='full' is no adapter: vLLM takes none with whole weights; use "
            "`python -m train fold`, or projector='lora'"
        )
    with one_process_first():
        open_run(out, describe_run(recipe, structure, material, base), fresh=fresh)
    if (out / "run.json").exists():
        return out
    set_seed(recipe.seed)
    model = load_llava(base, dtype=DTYPES[recipe.dtype])
    stages.end("loading")
    sight = Sight(model, cache)
    is_cached = prepare_images(recipe, sight, material)
    stages.end("images")
    wrapper = add_lora(model, recipe)
    trainer = make_trainer(recipe, structure, material, model, sight, out, is_cached=is_cached)
    step = run_trainer(trainer, recipe, out)
    stages.end("training")
    if trainer.is_world_process_zero():
        _finish(trainer, wrapper, recipe, out, best_step=step, stages=stages)
    return out


def one_process_first() -> AbstractContextManager[None]:
    """Where several processes train together, lets the first one go ahead."""
    return PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def make_trainer(
    recipe: Recipe,
    structure: LabelStructure,
    material: Material,
    model: Llava,
    sight: Sight,
    out: Path,
    *,
    is_cached: bool,
) -> AnswerTrainer:
    """A trainer of what asks for gradients in the model."""
    examples = Examples(
        model,
        structure,
        material.train,
        weight_power=recipe.weight_power,
        prompts=material.prompts,
    )
    if recipe.gradient_checkpointing:
        checkpoint_gradients(model)
    return AnswerTrainer(
        student=Student(model, label_smoothing=recipe.label_smoothing),
        model=model,
        structure=structure,
        examples=examples,
        dev=material.dev,
        sight=sight,
        recipe=recipe,
        folder=out,
        is_cached=is_cached,
    )


def run_trainer(trainer: AnswerTrainer, recipe: Recipe, out: Path) -> int:
    """Trains to the end and takes the weights the recipe keeps; returns their step.

    Raises:
        ConfigError: the disk is full. Finished checkpoints stay, a later run goes on from there.
    """
    checkpoint = last_checkpoint(out)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = trainer.state.log_history
        evaluated = [entry["step"] for entry in history if "eval_macro_f1" in entry]
        if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
            trainer._determine_best_metric(trainer.evaluate(), None)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise ConfigError(
            f"--out {out}: a checkpoint cannot be written, the disk is full or a limit reached "
            f"({str(error)[:120]}); free some and run the same command again, it goes on from the "
            "last checkpoint",
            param="out",
        ) from error
    if recipe.keep == "best" and trainer.eval_dataset is not None:
        return take_best(trainer, trainer.model)
    return int(trainer.state.global_step)


def is_full(error: BaseException) -> bool:
    """Whether a file could not grow: torch and safetensors wrap the system's error in their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return True
    signs = ("No space left", "os error 28", "os error 27", "PytorchStreamWriter failed writing")
    return any(sign in str(error) for sign in signs)


def _finish(
    trainer: AnswerTrainer,
    wrapper: Any,
    recipe: Recipe,
    out: Path,
    *,
    best_step: int,
    stages: Stages,
) -> None:
    """The adapter and `run.json`, each in place by one rename; checkpoints are done with."""
    partial = out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    save_lora(wrapper, partial, Path(config["base"]).name)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    partial.rename(out / "adapter")
    stages.end("saving")
    evaluations = [
        {key.removeprefix("eval_"): value for key, value in entry.items()}
        for entry in trainer.state.log_history
        if "eval_macro_f1" in entry
    ]
    metrics = next((e for e in evaluations if e["step"] == best_step), {})
    write_json(
        out / "run.json",
        {
            "finished": True,
            **config,
            "recipe": recipe.name,
            "settings": config["recipe"],
            "num_steps": trainer.state.global_step,
            "best_step": best_step,
            "metrics": {k: v for k, v in metrics.items() if k not in ("step", "epoch")},
            "trainable_parameters": sum(p.numel() for p in trainer.model.learned().values()),
            "seconds": round(sum(stages.seconds.values()), 1),
            "seconds_by_stage": stages.seconds,
            "notes": list(recipe.notes),
        },
    )
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def describe_run(
    recipe: Recipe, structure: LabelStructure, material: Material, base: Path
) -> dict[str, Any]:
    """What two runs must share to be one."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "label_structure": structure.model_dump(mode="json"),
        "base": str(base),
        "base_fingerprint": fingerprint(base) if base.is_dir() else None,
        "image_mode": read_image_mode(base),
        "seed": recipe.seed,
        "data": {
            **material.source,
            **({"prompts": list(material.prompts)} if material.prompts else {}),
            "train": describe_posts(structure, material.train),
            "dev": describe_posts(structure, material.dev),
        },
    }


def describe_posts(structure: LabelStructure, posts: Iterable[Post]) -> dict[str, Any]:
    """How many posts, and by field and label."""
    labels: dict[str, dict[str, int]] = {
        name: dict.fromkeys(allowed, 0) for name, allowed in structure.fields.items()
    }
    count = 0
    for post in posts:
        count += 1
        for name, label in check_labels(structure, post).items():
            labels[name][label] += 1
    return {"posts": count, "labels": labels}


def open_run(out: Path, config: dict[str, Any], *, fresh: bool) -> None:
    """Starts a run folder, or checks that the one that is there is this run's.

    Raises:
        ConfigError: it is another run's; names what differs.
    """
    path = out / "config.json"
    if fresh and path.exists():
        shutil.rmtree(out)
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(
                f"--out {out} is not empty and holds no run; name another", param="out"
            )
        write_json(path, config)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != config:
        raise ConfigError(
            f"--out {out} holds a run with another config: {_difference(before, config)}; name "
            "another folder, or add --fresh to throw that run away",
            param="out",
        )


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first settings that differ."""
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_difference(old, new, f"{prefix}{key}."))
        else:
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return "; ".join(found[:5])


def check_selector(recipe: Recipe) -> None:
    """Refuses selectors that do not exist."""
    if recipe.selector not in SELECTORS:
        raise ConfigError(
            f"recipe {recipe.name!r}: selector={recipe.selector!r}; allowed are {list(SELECTORS)}"
        )


def prepare_images(recipe: Recipe, sight: Sight, material: Material) -> bool:
    """Runs the tower on all images once, where that is cheaper; whether features are cached."""
    images = {image for post in material.train for image in post.images}
    needed = len(images) * sight.bytes_per_image
    is_cached = recipe.cache == "always" or (
        recipe.cache == "auto" and (recipe.retention_ratio < 1 or needed < CACHE_BYTES)
    )
    if is_cached:
        sight.see(material.train)
    sight.see(material.dev)
    return is_cached


def checkpoint_gradients(model: Llava) -> None:
    """Recomputes the language model's activations in the backward pass."""
    language = model.llava.model.language_model
    language.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
