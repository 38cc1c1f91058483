"""`python -m train evaluate`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.errors import ConfigError
from serving.manifest import fingerprint
from serving.posts import Post, read_posts
from serving.structures import STRUCTURES, LabelStructure, find_structure, load_structures

if TYPE_CHECKING:
    from train.evaluated import EvaluatedModel
    from train.evaluation import Chosen, Plan
    from train.served import ServedModel

DESCRIPTION = """\
Say how well an adapter labels posts, beside everything it has to beat.

The model answers at every selector and retention ratio, here in Hugging Face or through a running
server. Beside it: the majority label, a perfect text label and a perfect image label, TF-IDF with
logistic regression on the training posts, the model with the text alone and with the image alone,
the base model without the adapter, and the model with the images of other posts. Where that
last one costs nothing, the report says that no conclusion on retention can be drawn.

Figures have 95 % bootstrap intervals, differences are paired by post, two models meet in McNemar's
exact test. The last field of the label structure is the one that counts.

A folder --out gets, all at once when the run has ended:
  evaluation.md       tables and conclusions
  evaluation.json     the same for machines
  predictions.jsonl   a line a post, selector and ratio: labels, probabilities, truth
  *.svg               macro-F1 by ratio, reliability, confusion
"""
EPILOG = """\
examples:
  python -m train evaluate --base llava-hf/llava-1.5-7b-hf --adapter runs/llavac/adapter \\
      --data MVSA_Single --out runs/llavac-dev
  python -m train evaluate --server http://127.0.0.1:8000 --model llavac --data MVSA_Single \\
      --ratios 1,0.4 --selectors cls,random
  python -m train evaluate --base BASE --adapter ADAPTER --data dev.jsonl --split all \\
      --train-data train.jsonl --train-split all --no-baselines
"""
ALL, NONE = "all", "none"


class Flags(BaseModel):
    """Flags of `evaluate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path | None
    adapter: Path | None
    server: str | None
    model: str | None
    data: Path
    split: str
    train_data: Path | None
    train_split: str
    structure: str | None
    structures: Path | None
    fields: str | None
    ratios: tuple[float, ...]
    selectors: tuple[str, ...]
    limit: int | None = Field(ge=1)
    skip_unlabelled: bool
    skip_broken: bool
    no_baselines: bool
    resamples: int = Field(ge=100, le=100_000)
    out: Path | None
    dtype: Literal["float32", "bfloat16", "float16"]
    cache: Path | None
    concurrency: int = Field(ge=1, le=256)
    threads: int = Field(ge=1)
    seed: int = Field(ge=0)

    @field_validator("ratios", "selectors", mode="before")
    @classmethod
    def _split(cls, value: str) -> list[str]:
        return [part.strip() for part in value.split(",") if part.strip()]

    @model_validator(mode="after")
    def _check(self) -> Flags:
        if (self.base is None) == (self.server is None):
            raise ConfigError("give either --base (to run here) or --server, not both or neither")
        for name, needed in (("adapter", "base"), ("cache", "base"), ("model", "server")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ConfigError(f"--{name} needs --{needed}", param=name)
        return self


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--base", type=Path, help="LLaVA-1.5 checkpoint: a folder or a hub id")
    add("--adapter", type=Path, help="folder of a PEFT adapter (default: the base alone)")
    add("--server", metavar="URL", help="ask a running server instead of loading the model here")
    add("--model", metavar="NAME", help="an adapter on that server (default: its base model)")
    add("--data", type=Path, required=True, help="posts with labels, in any layout `data` reads")
    add("--split", default="dev", help="posts to answer: a name, a file of ids, or all (dev)")
    add("--train-data", type=Path, help="posts that baselines learn from (default: --data)")
    add("--train-split", default="train", help="which of them: as --split, or none (train)")
    add("--structure", help="label structure (default: what adapter or server say it is for)")
    add("--structures", type=Path, help="YAML file with label structures of your own")
    add("--fields", help="your own field names: text=tweet,image=photo,labels.sentiment=y")
    ratios = "shares of visual tokens kept, in (0, 1]; 1 is always asked (default: %(default)s)"
    add("--ratios", default="1,0.8,0.6,0.4,0.2,0.05", help=ratios)
    add("--selectors", default=ALL, help="how the kept ones are chosen: cls,random (default: all)")
    add("--limit", type=int, help="answer the first N posts only")
    add("--skip-unlabelled", action="store_true", help="leave posts without label out, counted")
    add("--skip-broken", action="store_true", help="leave posts with broken images out, counted")
    add("--no-baselines", action="store_true", help="the model alone")
    add("--resamples", type=int, default=2000, help="of the bootstrap (default: 2000)")
    add("--out", type=Path, help="folder for report, predictions and plots (default: print only)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    add("--cache", type=Path, help="keep what the tower sees here, for other runs as well")
    add("--concurrency", type=int, default=16, help="requests at once, with --server (16)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    add("--seed", type=int, default=0, help="of bootstrap, folds and shuffle (default: 0)")


def run(given: Namespace) -> int:
    """Evaluates and prints the tables."""
    flags = Flags.model_validate({k: v for k, v in vars(given).items() if k != "run"})
    import torch

    from train.evaluation import evaluate
    from train.report.figures import summarize
    from train.report.folder import check_out, write_evaluation
    from train.report.markdown import render_terminal

    torch.set_num_threads(flags.threads)
    plan = _plan(flags)
    structures = {**STRUCTURES, **(load_structures(flags.structures) if flags.structures else {})}
    with ExitStack() as stack:
        served = None
        if flags.server is not None:
            served = stack.enter_context(closing(_open_server(flags, structures)))
        structure, facts = (
            (served.structure, {"server": served.server, "model": served.name})
            if served
            else _describe_local(flags, structures)
        )
        chosen, train = _choose(flags, structure), _read_train(flags, structure)
        configuration = {
            **facts,
            **_describe_posts(flags, chosen.posts, train),
            **_describe_plan(structure, plan),
        }
        # All that can be wrong is known before a model is loaded.
        if flags.out is not None:
            check_out(flags.out, configuration)
        model = served or _load(flags, structure)
        evaluation = evaluate(model, chosen, train=train, plan=plan)
    report = {"configuration": configuration, **summarize(evaluation)}
    print(render_terminal(report))
    if flags.out is not None:
        write_evaluation(flags.out, evaluation, report)
        print(f"\nwritten: {flags.out}/evaluation.md", file=sys.stderr)
    return 0


def _plan(flags: Flags) -> Plan:
    from patches.selection import SELECTORS
    from train.evaluation import Plan

    return Plan(
        ratios=flags.ratios,
        selectors=tuple(SELECTORS) if flags.selectors == (ALL,) else flags.selectors,
        seed=flags.seed,
        num_resamples=flags.resamples,
        has_baselines=not flags.no_baselines,
    )


def _open_server(flags: Flags, structures: Mapping[str, LabelStructure]) -> ServedModel:
    from train.served import ServedModel

    assert flags.server is not None
    return ServedModel(
        flags.server,
        flags.model,
        find_structure(structures, flags.structure) if flags.structure else None,
        concurrency=flags.concurrency,
    )


def _describe_local(
    flags: Flags, structures: Mapping[str, LabelStructure]
) -> tuple[LabelStructure, dict[str, Any]]:
    """The structure to ask for, and what tells this model from others; nothing is loaded yet."""
    from train.lineage import Lineage, check_base, find_adapter_structure, read_lineage

    assert flags.base is not None
    lineage = read_lineage(flags.adapter, structures) if flags.adapter else Lineage()
    structure = find_adapter_structure(lineage, flags.structure, structures)
    facts = {"base": flags.base.name, "base_fingerprint": _fingerprint(flags.base)}
    if flags.adapter is not None:
        check_base(flags.adapter, lineage, flags.base)
        facts["adapter"] = "/".join(flags.adapter.resolve().parts[-2:])
        facts["adapter_fingerprint"] = _fingerprint(flags.adapter)
    return structure, {**facts, "dtype": flags.dtype}


def _fingerprint(folder: Path) -> str | None:
    try:
        return fingerprint(folder)
    except FileNotFoundError:  # a hub id, or weights in another format
        return None


def _load(flags: Flags, structure: LabelStructure) -> EvaluatedModel:
    from train.evaluated import LocalModel
    from train.model import DTYPES

    assert flags.base is not None
    return LocalModel(
        structure, flags.base, flags.adapter, dtype=DTYPES[flags.dtype], cache=flags.cache
    )


def _read_train(flags: Flags, structure: LabelStructure) -> list[Post]:
    """Posts that baselines learn from; labels outside the structure teach nothing."""
    if flags.no_baselines or flags.train_split == NONE:
        return []
    posts = _read(flags, flags.train_data or flags.data, flags.train_split, structure, None)
    return [
        post
        for post in posts
        if all(
            post.labels.get(name, labels[0]) in labels for name, labels in structure.fields.items()
        )
    ]


def _read(
    flags: Flags, data: Path, split: str, structure: LabelStructure, limit: int | None
) -> list[Post]:
    from train.material import parse_fields

    source = read_posts(
        data,
        split=None if split == ALL else split,
        fields=parse_fields(flags.fields),
        structure=structure,
    )
    return list(islice(source, limit))


def _choose(flags: Flags, structure: LabelStructure) -> Chosen:
    from train.evaluation import choose_posts

    return choose_posts(
        structure,
        _read(flags, flags.data, flags.split, structure, flags.limit),
        skip_unlabelled=flags.skip_unlabelled,
        skip_broken=flags.skip_broken,
    )


def _describe_posts(flags: Flags, posts: Sequence[Post], train: Sequence[Post]) -> dict[str, Any]:
    return {
        "data": flags.data.name,
        "split": _split_name(flags.split),
        "posts": _digest(posts),
        "train_data": (flags.train_data or flags.data).name,
        "train_split": _split_name(flags.train_split),
        "train_posts": _digest(train),
    }


def _describe_plan(structure: LabelStructure, plan: Plan) -> dict[str, Any]:
    return {
        "structure": structure.name,
        "prompt": structure.prompt,
        "ratios": list(plan.ratios),
        "selectors": list(plan.selectors),
        "baselines": plan.has_baselines,
        "resamples": plan.num_resamples,
        "seed": plan.seed,
    }


def _split_name(split: str) -> str:
    return Path(split).name.removesuffix("_ids.txt")


def _digest(posts: Sequence[Post]) -> str:
    """How many posts and, in short, which: ids, texts and labels."""
    digest = hashlib.sha256()
    for post in posts:
        digest.update(json.dumps([post.id, post.text, dict(post.labels)], sort_keys=True).encode())
    return f"{len(posts)} ({digest.hexdigest()[:12]})"
