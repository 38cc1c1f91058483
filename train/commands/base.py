"""`python -m train base`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from os import cpu_count
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import ConfigError
from serving.manifest import ImageMode

DESCRIPTION = """\
Train a small LLaVA from nothing on posts of your own: tokenizer, vision tower, projector and
language model, ready for adapters (`python -m train fit small --base OUT ...`). Use it where no
published checkpoint can be had, or to try the whole way on a CPU.

Only the posts of --split are read. Linear models on word counts and on colours and edges, fitted
on the other posts each time, say how each post feels; the tower and the language model learn to
say the same, so that the posts' own labels are left for the adapters.

A run that is stopped goes on where it was when the same command is given again. OUT holds the
checkpoint in the format of llava-hf/llava-1.5-7b-hf, and base.json with settings, figures and
seconds.
"""


class Flags(BaseModel):
    """Flags of `base`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    split: str | None
    out: Path
    size: str
    image_mode: ImageMode
    seed: int = Field(ge=0)
    threads: int = Field(ge=1)
    fresh: bool


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="posts, in any layout `train data` reads")
    add("--split", help="ids to learn from: a name or a file (default: all posts)")
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    add("--size", default="small", help="how large and how long (default: small)")
    add(
        "--image-mode",
        default="crop",
        help="crop: pictures are cut to a square, as Hugging Face does; pad: bars are added, as "
        "LLaVA-1.5's own code does (default: crop)",
    )
    add("--seed", type=int, default=0, help="of folds, weights and batches (default: 0)")
    add("--threads", type=int, default=cpu_count() or 1, help="CPU threads (default: all cores)")
    add("--fresh", action="store_true", help="throw away what is in OUT and begin anew")


def run(given: Namespace) -> int:
    """Builds the base and prints what its report says."""
    values = {name: value for name, value in vars(given).items() if name != "run"}
    flags = Flags.model_validate(values)
    import torch

    from serving.posts import read_posts
    from train.scratch.build import build_base
    from train.scratch.settings import SIZES

    if flags.size not in SIZES:
        raise ConfigError(
            f"--size {flags.size!r} is unknown; allowed are {list(SIZES)}", param="size"
        )
    torch.set_num_threads(flags.threads)
    report = build_base(
        list(read_posts(flags.data, split=flags.split)),
        flags.out,
        size=flags.size,
        image_mode=flags.image_mode,
        seed=flags.seed,
        source=flags.data.name,
        fresh=flags.fresh,
    )
    print(json.dumps({name: report[name] for name in ("figures", "seconds")}, indent=1))
    print(f"next: python -m train fit small --base {flags.out} --data {flags.data} ...")
    return 0
