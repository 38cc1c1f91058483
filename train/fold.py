"""Trains the projector and writes it into a new base checkpoint.

An adapter cannot carry whole projector weights (vLLM refuses `modules_to_save`), so whoever wants
more than LoRA there gets a base of its own, which many adapters then share.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed

from serving.errors import ConfigError
from serving.structures import LabelStructure
from train.demo.checkpoint import published_name
from train.fit import (
    Material,
    check_selector,
    describe_run,
    make_trainer,
    one_process_first,
    open_run,
    prepare_images,
    run_trainer,
)
from train.model import DTYPES, Llava, load_llava
from train.recipes import Recipe
from train.sight import Sight

PROJECTOR = "multi_modal_projector"


def fold(
    recipe: Recipe,
    structure: LabelStructure,
    material: Material,
    *,
    base: Path,
    out: Path,
    cache: Path | None = None,
    fresh: bool = False,
) -> Path:
    """Trains the projector alone, or goes on where a stopped run was; returns the new checkpoint.

    The run folder is `OUT.run`, beside `out`.

    Raises:
        ConfigError: the recipe trains something else, `out` is there already, the base is no local
            folder of safetensors, or anything `train.fit.fit` raises.
    """
    check_selector(recipe)
    if recipe.projector != "full":
        raise ConfigError(
            f"recipe {recipe.name!r} has projector={recipe.projector!r}; fold needs 'full', as the "
            "recipe 'projector' has"
        )
    if not base.is_dir():
        raise ConfigError(f"--base {base}: fold needs the checkpoint as a local folder")
    if out.exists():
        raise ConfigError(f"--out {out} is there already; name another folder", param="out")
    run = out.with_name(f"{out.name}.run")
    with one_process_first():
        open_run(run, describe_run(recipe, structure, material, base), fresh=fresh)
    set_seed(recipe.seed)
    model = load_llava(base, dtype=DTYPES[recipe.dtype])
    train_projector_only(model)
    sight = Sight(model, cache)
    is_cached = prepare_images(recipe, sight, material)
    trainer = make_trainer(recipe, structure, material, model, sight, run, is_cached=is_cached)
    run_trainer(trainer, recipe, run)
    if trainer.is_world_process_zero():
        write_folded(base, projector_of(model), out)
    return out


def train_projector_only(model: Llava) -> None:
    """Freezes all but the projector, which learns in float32."""
    model.llava.requires_grad_(False)
    projector = model.llava.model.multi_modal_projector
    projector.float().requires_grad_(True)
    # Features come in the frozen weights' precision.
    projector.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def projector_of(model: Llava) -> dict[str, Tensor]:
    """The projector's weights by their published names, float32."""
    return {
        published_name(name): value.detach().float().cpu().contiguous()
        for name, value in model.llava.state_dict().items()
        if PROJECTOR in name
    }


def write_folded(base: Path, projector: dict[str, Tensor], out: Path) -> None:
    """The base with another projector, in place by one rename.

    The files that hold the projector say so in their header: the fingerprint of a checkpoint reads
    headers, so adapters of the old base are refused on the new one.

    Args:
        base: checkpoint folder.
        projector: weights by published name.
        out: a folder that is not there yet.

    Raises:
        ConfigError: the base's weights have other names or shapes, or the disk is full.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(base, partial, ignore=shutil.ignore_patterns(".*", "*.bin", "*.pt"))
        left = set(projector)
        for path in sorted(partial.glob("*.safetensors")):
            left -= _replace(path, projector)
        if left:
            raise ConfigError(f"--base {base} has no {sorted(left)} in its safetensors files")
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}", param="out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(path: Path, projector: dict[str, Tensor]) -> set[str]:
    """Puts the weights of a file in place; the names it found there."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        found = set(names) & projector.keys()
        if not found:
            return set()
        weights = {name: file.get_tensor(name) for name in names}
        metadata = file.metadata() or {}
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(found):
        if weights[name].shape != projector[name].shape:
            raise ConfigError(
                f"{name} has shape {list(weights[name].shape)} in the base and "
                f"{list(projector[name].shape)} in the trained model"
            )
        weights[name] = projector[name].to(weights[name].dtype)
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    folded = {**metadata, "format": "pt", "folded": digest.hexdigest()}
    save_file({n: w.contiguous() for n, w in weights.items()}, path, metadata=folded)
    return found
