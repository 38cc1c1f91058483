"""`python -m train study`."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import ConfigError
from serving.structures import STRUCTURES, load_structures
from train.commands.fit import add_data_flags, material_of
from train.recipes import RECIPES, Recipe, make_recipe
from train.studies.catalog import STUDIES, find_study

if TYPE_CHECKING:
    from train.studies.setup import Options, Setup

DESCRIPTION = """\
Run one of the cross-checks that the papers ask for, over several seeds, and report it.

A study is made of cells: a training, or an evaluation of the dev posts. Each leaves its result in
OUT/cells, so a study that was stopped goes on where it was; a training that was killed goes on in
OUT/runs. The tower sees each image once for all cells (--cache). A line a cell goes to stderr.

The folder --out gets study.md (tables, what follows and what does not), study.json and pictures.
Figures are means over seeds with their standard deviation; two models that meet are compared on
the same posts, by a paired bootstrap and McNemar's exact test.

A study runs in one process on one GPU (the first, or CUDA_VISIBLE_DEVICES) or on the CPU.
"""
EXAMPLES = """\
examples:
  python -m train study labels --base llava-hf/llava-1.5-7b-hf --data MVSA_Single \\
      --train-split train --dev-split dev --out studies/labels
  python -m train study rank --recipe demo --set num_epochs=2 --ranks 8,128 --base runs/small ...
  python -m train study transfer --to twitter2015 --to-split test \\
      --to-fields labels.multimodal=sentiment ...
"""


class _List(argparse.Action):
    """`--list` prints the studies and ends, whatever else is missing."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        print(describe_studies())
        parser.exit()


def describe_studies() -> str:
    """Each study: what it answers, why, what it costs, its own flags."""
    parts = []
    for name, entry in STUDIES.items():
        own = " ".join("--" + option.replace("_", "-") for option in entry.options) or "none"
        parts.append(
            f"  {name}\n      {entry.summary}\n      why: {entry.why}\n"
            f"      takes: {entry.cost}\n      own flags: {own}"
        )
    return "\n".join(parts)


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = f"studies:\n{describe_studies()}\n\n{EXAMPLES}"
    add = parser.add_argument
    add("study", metavar="STUDY", help="one of the studies below")
    add("--list", nargs=0, action=_List, help="print the studies and stop")
    add("--base", type=Path, required=True, help="LLaVA-1.5 checkpoint: a folder or a hub id")
    add_data_flags(parser)
    add("--out", type=Path, required=True, help="the study's folder")
    add("--seeds", default="0,1,2", help="of the trainings (default: 0,1,2)")
    add("--recipe", default="llavac", help=f"one of {', '.join(RECIPES)} (default: llavac)")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change all its recipes")
    add("--config", type=Path, help="the same from a YAML file")
    add("--cache", type=Path, help="keep the tower's features here (default: OUT/cache)")
    add("--dtype", default="float32", help="models answer in: float32, bfloat16 or float16")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    add("--fresh", action="store_true", help="throw the study in --out away and begin anew")
    own = parser.add_argument_group("flags of single studies").add_argument
    own("--ratios", help="retention: shares of visual tokens kept (1,0.8,0.6,0.4,0.2,0.05)")
    own("--selectors", help="retention: which are kept; random and stride are always among them")
    own("--also-base", type=Path, help="retention: a checkpoint with the other image mode")
    own("--ranks", help="rank: LoRA ranks; alpha is twice the rank (8,16,32,64,128)")
    own("--shares", help="noise: shares of wrong unimodal labels (0,0.1,0.2,0.3)")
    own("--to", type=Path, help="transfer: the other data set")
    own("--to-split", help="transfer: its posts to answer: a name, a file, or all (dev)")
    own("--to-train-split", help="transfer: its posts that its own baselines learn from")
    own("--to-fields", help="transfer: its field names, as --fields")
    own("--also-single", action="store_true", default=None, help="prompts: an arm on 1 phrasing")


def run(given: Namespace) -> int:
    """Runs a study and prints its report."""
    find_study(given.study)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    from train.studies.study import make_study, run_study

    torch.set_num_threads(given.threads)
    study = make_study(setup_of(given))
    run_study(study, fresh=given.fresh)
    print((given.out / "study.md").read_text(encoding="utf-8"))
    print(f"{given.out}: study.md, study.json and pictures")
    return 0


def setup_of(given: Namespace) -> Setup:
    """The study's setup, its posts read.

    Raises:
        ConfigError: a flag that this study does not have, or posts that cannot be used.
    """
    from train.model import DTYPES
    from train.studies.setup import Setup

    if given.dtype not in DTYPES:
        raise ConfigError(f"--dtype {given.dtype!r}: allowed are {', '.join(DTYPES)}")
    seeds, recipe, options = _seeds(given.seeds), recipe_of(given), _options(given)
    structure, material = material_of(given, recipe.structure)
    return Setup(
        study=given.study,
        base=_absolute(given.base),
        out=given.out,
        cache=given.cache or given.out / "cache",
        dtype=given.dtype,
        seeds=seeds,
        recipe=recipe,
        structure=structure,
        structures={
            **STRUCTURES,
            **(load_structures(given.structures) if given.structures else {}),
        },
        material=material,
        options=options,
    )


def recipe_of(given: Namespace) -> Recipe:
    """The recipe with the command line's changes, but for what the study itself varies."""
    varied = {"seed": "--seeds", **({"rank": "--ranks"} if given.study == "rank" else {})}
    if given.study == "rank":
        varied["alpha"] = "--ranks (alpha is twice the rank)"
    for setting in given.set:
        name = setting.partition("=")[0]
        if name in varied:
            raise ConfigError(f"--set {setting}: this study varies it; use {varied[name]}")
    return make_recipe(given.recipe, file=given.config, settings=given.set)


def _absolute(base: Path) -> Path:
    """A folder's whole path, so that a study goes on from any working directory; a hub id as is."""
    return base.resolve() if base.is_dir() else base


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds {text!r}: expected whole numbers, e.g. 0,1,2", param="seeds")
    return seeds


def _options(given: Namespace) -> Options:
    from train.studies.setup import Options

    allowed = STUDIES[given.study].options
    own = {name for entry in STUDIES.values() for name in entry.options}
    found = {name: getattr(given, name) for name in own if getattr(given, name) is not None}
    if given.also_base:
        found["also_base"] = _absolute(given.also_base)
    for name in found:
        if name not in allowed:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is no flag of study {given.study!r}", param=name)
    shared = {name: getattr(given, name) for name in ("skip_unlabelled", "skip_broken", "limit")}
    return Options(**found, **shared)
