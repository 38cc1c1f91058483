"""`python -m train posts`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import ConfigError

DESCRIPTION = """\
Write synthetic posts in MVSA-Single's layout: data/ID.png, data/ID.txt and labelResultAll.txt
with a row `ID<TAB>text,image` a post. `python -m serving label --data FOLDER` reads it.
"""


class Flags(BaseModel):
    """Flags of `posts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    count: int = Field(ge=1, le=100_000)
    split: str
    balanced: bool
    seed: int = Field(ge=0)


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write into")
    add("--count", type=int, default=200, help="how many posts (default: 200)")
    add("--split", default="test", help="train, test or unseen-words (default: test)")
    add("--balanced", action="store_true", help="labels equally often, not as in MVSA-Single")
    add("--seed", type=int, default=0, help="of the data (default: 0)")


def run(given: Namespace) -> int:
    """Writes the posts."""
    values = {name: value for name, value in vars(given).items() if name != "run"}
    flags = Flags.model_validate(values)
    from train.demo.dataset import SPLITS, demo_posts
    from train.demo.export import export_mvsa

    if flags.split not in SPLITS:
        raise ConfigError(f"--split {flags.split!r} is unknown; allowed are {list(SPLITS)}")
    posts = demo_posts(flags.count, split=flags.split, balanced=flags.balanced, seed=flags.seed)
    print(f"{export_mvsa(posts, flags.out)} posts in {flags.out}")
    return 0
