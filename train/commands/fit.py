"""`python -m train fit`."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.recipes import RECIPES, Recipe, make_recipe

if TYPE_CHECKING:
    from serving.structures import LabelStructure
    from train.fit import Material

DESCRIPTION = """\
Train an adapter by a recipe: from posts to a folder that `python -m train export` makes ready for
the server.

The tower stays frozen, so it sees each image once; its features are kept in --cache and serve every
epoch, evaluation and study on the same checkpoint. A run that was stopped or killed goes on
exactly where its last checkpoint was when the same command is given again.

A run folder holds config.json, log.jsonl (a line a figure), tensorboard/, and when it is finished
adapter/ (PEFT) and run.json. On several GPUs the same command uses all of them.
"""
EPILOG = """\
examples:
  python -m train fit llavac --base llava-hf/llava-1.5-7b-hf --data MVSA_Single \\
      --train-split train --dev-split dev --out runs/llavac
  python -m train fit robust --base runs/small --data posts.jsonl --out runs/robust \\
      --set learning_rate=1e-3 num_epochs=4 --dry-run
"""


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    recipes = "\n".join(f"  {name:<14} {_first_line(make)}" for name, make in RECIPES.items())
    fields = "\n".join(f"  {name:<22} {info}" for name, info in _field_help())
    parser.epilog = f"recipes:\n{recipes}\n\nfields for --set and --config:\n{fields}\n\n{EPILOG}"
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="one of the recipes below")
    add("--base", type=Path, required=True, help="LLaVA-1.5 checkpoint: a folder or a hub id")
    add_data_flags(parser)
    add("--out", type=Path, required=True, help="run folder")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change the recipe")
    add("--config", type=Path, help="the same from a YAML file")
    add("--seed", type=int, help="of weights, order and dropout (default: the recipe's)")
    add("--cache", type=Path, help="keep the tower's features here, for other runs as well")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    add("--dry-run", action="store_true", help="print sizes, steps, memory and an example; stop")
    add("--fresh", action="store_true", help="throw the run in --out away and begin anew")


def add_data_flags(parser: ArgumentParser) -> None:
    """Flags that say which posts."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="posts, in any layout `train data` reads")
    add("--train-split", help="ids to train on: a name or a file (default: all posts)")
    add("--dev-split", help="ids to evaluate on while training (default: none)")
    add("--fields", help="your own field names: text=tweet,image=photo,labels.sentiment=y")
    add("--structures", type=Path, help="YAML file with label structures of your own")
    add("--limit", type=int, help="use the first N posts of each split only")
    add("--skip-unlabelled", action="store_true", help="leave posts without a label out, counted")
    add("--skip-broken", action="store_true", help="leave posts with broken images out, counted")


def material_of(given: Namespace, structure: str) -> tuple[LabelStructure, Material]:
    """The structure of that name and the posts that the flags say.

    Raises:
        ConfigError: no such structure, or posts that cannot be used.
    """
    from train.material import read_material

    return read_material(
        given.data,
        structure,
        train=given.train_split,
        dev=given.dev_split,
        structures=given.structures,
        fields=given.fields,
        limit=given.limit,
        skip_unlabelled=given.skip_unlabelled,
        skip_broken=given.skip_broken,
    )


def run(given: Namespace) -> int:
    """Trains, or says what it would do."""
    recipe = recipe_of(given)
    relaunch = _launch_all_gpus()
    if relaunch is not None:
        return relaunch
    import torch

    from train.fit import fit
    from train.preview import preview

    torch.set_num_threads(given.threads)
    structure, material = material_of(given, recipe.structure)
    if given.dry_run:
        _print_preview(preview(recipe, structure, material, base=given.base))
        return 0
    out = fit(
        recipe,
        structure,
        material,
        base=given.base,
        out=given.out,
        cache=given.cache,
        fresh=given.fresh,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _print_run(out)
    return 0


def recipe_of(given: Namespace) -> Recipe:
    """The recipe with the command line's changes."""
    settings = [*given.set, *([f"seed={given.seed}"] if given.seed is not None else [])]
    return make_recipe(given.recipe, file=given.config, settings=settings)


def _launch_all_gpus() -> int | None:
    """Starts a process a GPU where there are several; None where this process trains."""
    import torch

    if "LOCAL_RANK" in os.environ or torch.cuda.device_count() < 2:
        return None
    from torch.distributed.run import main

    count = torch.cuda.device_count()
    main([f"--nproc-per-node={count}", "--module", "train", *sys.argv[1:]])
    return 0


def _print_preview(plan: dict[str, Any]) -> None:
    example = plan.pop("example")
    print(json.dumps(plan, indent=1))
    print(f"\nexample, post {example['id']!r} (one <image> stands for all of its tokens):")
    print(f"{example['prompt']}\n{example['answer']}")
    for name in ("prompt_ids", "answer_ids", "weights"):
        print(f"{name}: {example[name]}")


def _print_run(out: Path) -> None:
    summary = json.loads((out / "run.json").read_text(encoding="utf-8"))
    print(f"{out}: {summary['num_steps']} steps, {summary['seconds']:.0f} s")
    for name, value in summary["metrics"].items():
        print(f"  dev {name:<28} {value:.4f}")
    print(f"next: python -m train evaluate --base {summary['base']} --adapter {out}/adapter ...")


def _first_line(make: Any) -> str:
    return str(make.__doc__).splitlines()[0]


def _field_help() -> list[tuple[str, str]]:
    found = []
    for name, info in Recipe.model_fields.items():
        if name not in ("name", "notes"):
            kinds = getattr(info.annotation, "__args__", None)
            allowed = f" ({', '.join(map(str, kinds))})" if kinds else ""
            found.append((name, f"{info.description or ''}{allowed}".strip()))
    return found
