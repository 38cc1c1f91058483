"""Batches beside their engine's own limit, and beside vLLM's `run_batch`.

Two parts, by --parts:

  limit   one process, one engine: blocks through the whole pipeline (read, decode, fit, label,
          journal, publish) beside blocks whose inputs are rendered before the clock starts.
          Goal: within 10 % of the engine's rate.
  peer    whole processes in turn: `python -m serving batch` at ratio 1.0 and at --retention, and
          `python -m vllm.entrypoints.openai.run_batch` (stock architecture, no plugin) on the same
          checkpoint, adapters, prompt, labels and posts, as data URLs. Rows/s from the first post
          to the last answer; the engine's start stands apart. Goal: 1.2 times its rate.

Every post is labelled once an arm or process and has an image of its own, so caches of answers,
encoder and prompts find the same in all. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import fits
from bench.batch_limit import ARMS, BATCH, ENGINE, measure, write_posts
from bench.batch_peer import OURS, STRUCTURE, THEIRS, Race, race_ours, race_theirs, write_inputs
from bench.flops import Shape
from bench.outcome import BenchError, Outcome, positive, progress
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from serving.batch.options import BatchOptions
from serving.errors import SieveError
from serving.posts import Post, read_posts
from serving.settings import DEMO, Settings

PARTS = ("limit", "peer")
GOAL_LIMIT, GOAL_PEER = 0.9, 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--data", help="posts with an image each (default photos of noise, made on the spot)")
    add("--size", type=positive, nargs=2, default=(640, 480), help="of those photos (640 480)")
    add("--model", default=str(DEMO / "base"), help="checkpoint folder (default the demo)")
    add("--clip-l", action="store_true", help="a random base with CLIP-L/336's tower instead")
    add("--adapters", type=Path, help="adapters folder (default the demo's with the demo)")
    add("--ask", help="model or adapter that answers (default the demo's sentiment, or the base)")
    add("--retention", type=float, default=0.4, help="of `limit`, and beside 1.0 (default 0.4)")
    add("--rounds", type=positive, default=6, help="of `limit` (default 6)")
    add("--warmup", type=positive, default=1, help="of `limit`, before them (default 1)")
    add("--block", type=positive, default=128, help="posts a block of `limit` (default 128)")
    add("--races", type=positive, default=3, help="rounds of `peer` (default 3)")
    add("--posts", type=positive, default=400, help="posts of `peer` (default 400)")
    add("--concurrency", type=positive, default=64, help="posts in the engine (default 64)")
    add("--workers", type=int, default=0, help="processes that decode (default: cores - 1)")
    add("--max-num-seqs", type=positive, default=64, help="of all engines (default 64)")
    cores = len(os.sched_getaffinity(0))
    add("--threads", type=positive, default=cores, help="of an engine on CPU (default: cores)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default auto")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache on CPU (default 1)")


def run(options: argparse.Namespace) -> Outcome:
    """Runs the parts one after the other."""
    steps = {"limit": _limit, "peer": _peer}
    with tempfile.TemporaryDirectory(prefix="sieve-batch-") as name:
        settings = _settings(Path(name), options)
        options.ask = options.ask or ("sentiment" if settings.is_demo else settings.served_name)
        try:
            outcomes = [steps[part](Path(name), settings, options) for part in options.parts]
        except SieveError as error:
            raise BenchError(error.message) from error
    return Outcome(
        title="Batches: " + "; ".join(outcome.title for outcome in outcomes),
        headers=["what", "rows/s", "compared", "ratio [95 %]", "goal"],
        rows=[row for outcome in outcomes for row in outcome.rows],
        notes=[note for outcome in outcomes for note in outcome.notes],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=dict(zip(options.parts, (o.results for o in outcomes), strict=True)),
        samples=[sample for outcome in outcomes for sample in outcome.samples],
    )


def _settings(folder: Path, options: argparse.Namespace) -> Settings:
    names = ("adapters", "dtype", "max_num_seqs", "kv_cache_gib")
    chosen = {name: getattr(options, name) for name in names}
    if not options.clip_l:
        return Settings(model=options.model, **chosen)
    progress("writing a checkpoint with CLIP-L/336's tower ...")
    posts = fits.write_posts(folder / "words", 32, options.seed)
    shape = Shape(layers=2, width=512, mlp=1376, heads=8)
    fits.write_checkpoint(folder / "base", shape, posts, options.seed)
    return Settings(model=str(folder / "base"), **chosen)


def _limit(folder: Path, settings: Settings, options: argparse.Namespace) -> Outcome:
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    count = len(ARMS) * (options.warmup + options.rounds) * options.block
    size = tuple(options.size)
    data = options.data or write_posts(folder / "limit-posts", count, options.seed, size)
    asked = BatchOptions(
        data=str(data),
        out=folder / "limit",
        models=(options.ask,),
        retention=options.retention,
        shard_size=options.block,
        concurrency=options.concurrency,
        workers=options.workers,
    )
    counts = {name: getattr(options, name) for name in ("rounds", "warmup", "block", "seed")}
    return summarise_limit(asyncio.run(measure(asked, settings, **counts)), options)


def summarise_limit(samples: Sequence[Sample], options: argparse.Namespace) -> Outcome:
    """Rates of the arms, and what share of the engine's own rate each has."""
    seconds = by_variant(samples)
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for arm in ARMS:
        rate = options.block / median(seconds[arm])
        ratio = paired_ratio(seconds[ENGINE], seconds[arm])
        goal = _verdict(ratio.median, GOAL_LIMIT) if arm == BATCH else ""
        compared = "" if arm == ENGINE else f"{arm} / {ENGINE}"
        rows.append([arm, f"{rate:.1f}", compared, ratio if compared else "", goal])
        results[arm] = {"rate": rate, "ratio": vars(ratio)}
    return Outcome(
        title=f"limit in {options.rounds} rounds of {options.block} posts at {options.retention}",
        headers=[],
        rows=rows,
        notes=[
            f"limit: {options.concurrency} posts in the engine; on CPU the pipeline shares "
            f"{len(os.sched_getaffinity(0))} cores with the engine"
        ],
        settings={},
        results=results,
        samples=samples,
    )


def _peer(folder: Path, settings: Settings, options: argparse.Namespace) -> Outcome:
    size = tuple(options.size)
    data = options.data or write_posts(folder / "posts", options.posts, options.seed, size)
    posts = readable(data, options.posts)
    write_inputs(posts, folder, settings, options.ask)
    ratios = {f"{OURS} 1.0": 1.0, f"{OURS} {options.retention}": options.retention}
    found: dict[str, list[Race]] = {}
    for index, side in interleaved((*ratios, THEIRS), options.races, options.seed):
        name = f"{side.replace(' ', '-')}-{index}"
        race = (
            race_theirs(folder, name, settings, options.threads)
            if side == THEIRS
            else race_ours(
                folder, name, settings, options.ask, ratios[side], options.threads, options
            )
        )
        if len(race.labels) < len(posts):
            raise BenchError(f"{side} labelled {len(race.labels)} of {len(posts)} posts")
        progress(f"peer {index + 1}/{options.races} {side:10} {len(posts) / race.label_s:.1f}/s")
        found.setdefault(side, []).append(race)
    return summarise_peer(found, len(posts), options)


def readable(data: Any, count: int) -> list[Post]:
    """The first posts with one image each.

    Raises:
        BenchError: there are fewer.
    """
    source = read_posts(Path(data)).entries()
    posts = (post for post in source if isinstance(post, Post) and len(post.images) == 1)
    taken = list(itertools.islice(posts, count))
    if len(taken) < count:
        raise BenchError(f"--data {data}: {len(taken)} posts with one image, --posts is {count}")
    return taken


def summarise_peer(
    found: dict[str, list[Race]], num_posts: int, options: argparse.Namespace
) -> Outcome:
    """Rates, ratios over the rounds, engines' starts, and how often the labels are the same."""
    theirs = found[THEIRS]
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    notes = []
    for side, races in found.items():
        seconds = [race.label_s for race in races]
        ratio = paired_ratio([race.label_s for race in theirs], seconds)
        whole = paired_ratio([race.whole_s for race in theirs], [race.whole_s for race in races])
        rate, start = num_posts / median(seconds), median([r.whole_s - r.label_s for r in races])
        same = sum(races[0].labels[i] == label for i, label in theirs[0].labels.items())
        is_theirs = side == THEIRS
        compared = "" if is_theirs else f"{side} / {THEIRS}"
        goal = "" if is_theirs else _verdict(ratio.median, GOAL_PEER)
        rows.append([side, f"{rate:.1f}", compared, "" if is_theirs else ratio, goal])
        notes.append(f"peer: {side}: start and end {start:.0f} s, not in rows/s")
        if not is_theirs:
            notes[-1] += f"; whole process {whole} of {THEIRS}; {same}/{num_posts} same labels"
        results[side] = {"rate": rate, "ratio": vars(ratio), "whole": vars(whole), "same": same}
    decoded = theirs[0].num_decoded / num_posts
    notes.append(
        f"peer: {THEIRS} decodes {decoded:.1f} tokens a post, label and end; ours stops where the "
        f"label is decided, and gives probabilities of '{STRUCTURE.name}'"
    )
    samples = [
        Sample(round=index, variant=f"{side}/{what}", seconds=seconds)
        for side, races in found.items()
        for index, race in enumerate(races)
        for what, seconds in (("label", race.label_s), ("whole", race.whole_s))
    ]
    return Outcome(
        title=f"peer in {options.races} rounds of {num_posts} posts",
        headers=[],
        rows=rows,
        notes=notes,
        settings={},
        results=results,
        samples=samples,
    )


def _verdict(ratio: float, goal: float) -> str:
    return f">= {goal}: {'yes' if ratio >= goal else 'no'}"
