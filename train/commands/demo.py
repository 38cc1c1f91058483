"""`python -m train demo`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from os import cpu_count
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

DESCRIPTION = """\
Build the demo: synthetic posts, a CLIP-style tower, a small LLaVA-1.5 and two LoRA adapters.

Everything is drawn and trained from a seed; nothing is downloaded. A smiling, calm or frowning
face somewhere in each image and one word of each text carry the sentiment, and only both
together decide the post's. The report's test set has sentences and looks that training never
shows.

A build that is stopped goes on where it was when it is started again with the same flags. The
folder keeps its old demo until the new one is finished and measured:
  base/              the checkpoint, in the format of llava-hf/llava-1.5-7b-hf
  adapters/NAME/     a PEFT adapter and its manifest, for `python -m serving --adapters`
  report.json        accuracy and macro-F1 by adapter, selector and retention ratio
"""
SHIPPED = Path(__file__).parents[2] / "serving" / "demo"


class Flags(BaseModel):
    """Flags of `demo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    seed: int = Field(ge=0)
    fresh: bool
    threads: int = Field(ge=1)


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add(
        "--out", type=Path, default=SHIPPED, help="folder to build in (default: the one that ships)"
    )
    add("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    add("--fresh", action="store_true", help="build again, throwing unfinished work away")
    add("--threads", type=int, default=cpu_count() or 1, help="CPU threads (default: all cores)")


def run(given: Namespace) -> int:
    """Builds the demo and prints its report."""
    values = {name: value for name, value in vars(given).items() if name != "run"}
    flags = Flags.model_validate(values)
    import torch

    from train.demo.build import build_demo
    from train.demo.report import render_report

    torch.set_num_threads(flags.threads)
    print(render_report(build_demo(flags.out, seed=flags.seed, fresh=flags.fresh)))
    return 0
