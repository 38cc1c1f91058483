"""`python -m train`: builds the demo, or writes its posts out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import ConfigError, SieveError

_EPILOG = """\
examples:
  python -m train demo --out my_demo                 build the demo from nothing, in 10 minutes
  python -m train posts --out posts --count 200      write posts to label, with their labels
  python -m train demo --help                        what is built, and how to go on after a stop
"""
_DEMO = """\
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
_POSTS = """\
Write synthetic posts in MVSA-Single's layout: data/ID.png, data/ID.txt and labelResultAll.txt
with a row `ID<TAB>text,image` a post. `python -m serving label --data FOLDER` reads it.
"""


class DemoFlags(BaseModel):
    """Flags of `demo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    seed: int = Field(ge=0)
    fresh: bool
    threads: int = Field(ge=1)


class PostsFlags(BaseModel):
    """Flags of `posts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    count: int = Field(ge=1, le=100_000)
    split: str
    balanced: bool
    seed: int = Field(ge=0)


def main(argv: list[str]) -> int:
    """Runs a command; the exit status."""
    flags = vars(_parser().parse_args(argv))
    command = flags.pop("command")
    try:
        return command(flags)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            print(f"--{item['loc'][0]}: {item['msg']}, got {item['input']!r}", file=sys.stderr)
    except SieveError as error:
        print(error.message, file=sys.stderr)
    return 2


def _run_demo(values: dict[str, object]) -> int:
    flags = DemoFlags.model_validate(values)
    import torch

    from train.demo.build import build_demo
    from train.report import render_report

    torch.set_num_threads(flags.threads)
    print(render_report(build_demo(flags.out, seed=flags.seed, fresh=flags.fresh)))
    return 0


def _run_posts(values: dict[str, object]) -> int:
    flags = PostsFlags.model_validate(values)
    from train.demo.dataset import SPLITS, demo_posts
    from train.export import export_mvsa

    if flags.split not in SPLITS:
        raise ConfigError(f"--split {flags.split!r} is unknown; allowed are {list(SPLITS)}")
    posts = demo_posts(flags.count, split=flags.split, balanced=flags.balanced, seed=flags.seed)
    print(f"{export_mvsa(posts, flags.out)} posts in {flags.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train adapters for LLaVA-1.5; for now, the demo that ships with the server.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(
        commands.add_parser("demo", help="build the demo", description=_DEMO, formatter_class=raw)
    )
    _add_posts(
        commands.add_parser("posts", help="write posts", description=_POSTS, formatter_class=raw)
    )
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from os import cpu_count

    add = parser.add_argument
    shipped = Path(__file__).parents[1] / "serving" / "demo"
    add(
        "--out", type=Path, default=shipped, help="folder to build in (default: the one that ships)"
    )
    add("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    add("--fresh", action="store_true", help="build again, throwing unfinished work away")
    add("--threads", type=int, default=cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.set_defaults(command=_run_demo)


def _add_posts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write into")
    add("--count", type=int, default=200, help="how many posts (default: 200)")
    add("--split", default="test", help="train, test or unseen-words (default: test)")
    add("--balanced", action="store_true", help="labels equally often, not as in MVSA-Single")
    add("--seed", type=int, default=0, help="of the data (default: 0)")
    parser.set_defaults(command=_run_posts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
