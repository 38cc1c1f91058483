"""Where a labelled post's time goes, stage by stage, at each retention ratio.

A server as `python -m serving` starts it is asked over HTTP, one request at a time, every post
with a picture never seen before (a JPEG photo). Calls in all of its processes are timed on one
clock, and every instant between the first byte sent and the last byte of the answer belongs to the
stage that was at work, to a hand-over, or is `unattributed`, which stands by itself. A column is
the mean of the middle half of its requests by their end-to-end time, so that its rows add up; the
ratios of a round come in an order drawn anew. Goal: the named stages sum to the end-to-end time
within 5 %.

Under the stages: the speed-up that was measured, and Amdahl's bound beside it, which is what a
ratio could bring if projector and prefill shrank as the prompt does and all else stayed.

  --model demo           the shipped demo, adapter `llavac` (three labels); under 3 minutes
  --model clip-l         CLIP-L/336's tower and a small decoder, random weights
  --model llava-1.5-7b   LLaVA-1.5-7B's shape, random weights: 14 GB; --overhead off
  --structure sentiment  one label
  --saturated 16         also so many connections at once: processor time by process and stage

Two servers run unless --overhead off: one without any timer shows in the same rounds what timing
costs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.flops import RATIOS
from bench.outcome import BenchError, Outcome, positive, progress
from bench.stage_load import Load, saturate
from bench.stage_server import (
    DEMO_MODEL,
    MODELS,
    PLAIN,
    TIMED,
    Client,
    Question,
    StageServers,
    ask,
    stage_servers,
)
from bench.stage_spans import Timed, attributed
from bench.stage_table import summarise
from bench.statistics import interleaved
from serving.structures import STRUCTURES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--model", choices=MODELS, default=DEMO_MODEL, help=f"default {DEMO_MODEL}")
    add("--structure", default="llavac", choices=sorted(STRUCTURES), help="default llavac")
    add("--rounds", type=positive, default=20, help="timed rounds (default 20)")
    add("--warmup", type=positive, default=2, help="rounds before, not counted (default 2)")
    add("--picture", type=positive, nargs=2, default=(640, 480), help="size (default 640 480)")
    add("--overhead", choices=("on", "off"), default="on", help="of the timers (default on)")
    add("--saturated", type=int, default=0, help="connections at once, after that (default none)")
    add("--posts", type=positive, default=128, help="of each ratio when saturated (default 128)")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache on CPU (default 1)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the servers, asks them in turn and reads the timers."""
    if options.saturated < 0:
        raise BenchError(f"--saturated {options.saturated}: connections at once, 0 or more")
    variants = [TIMED] + ([PLAIN] if options.overhead == "on" else [])
    arguments = ["--kv-cache-gib", str(options.kv_cache_gib)]
    with tempfile.TemporaryDirectory(prefix="sieve-stages-") as name:
        with stage_servers(Path(name), options.model, variants, arguments) as servers:
            requests = _ask_in_turn(servers, options)
            loads = _load(servers, options) if options.saturated else []
        spans = servers.spans()
        progress(f"reading {len(spans)} timed calls ...")
        parts = attributed(spans, requests[TIMED])
    return summarise(parts, requests, [load.with_busy(spans) for load in loads], options)


def question_of(options: argparse.Namespace) -> Question:
    """What --model, --structure and --picture ask for."""
    has_adapter = options.model == DEMO_MODEL and options.structure in ("llavac", "sentiment")
    return Question(
        model=options.structure if has_adapter else None,
        structure=options.structure,
        size=tuple(options.picture),
        seed=options.seed,
    )


def _ask_in_turn(servers: StageServers, options: argparse.Namespace) -> dict[str, list[Timed]]:
    """Each round asks each server for each ratio once; posts are never repeated."""
    question, number = question_of(options), 0
    clients = {variant: Client(port) for variant, port in servers.ports.items()}
    found: dict[str, list[Timed]] = {variant: [] for variant in clients}
    num_rounds = options.warmup + options.rounds
    ratios = list(interleaved([str(r) for r in RATIOS], num_rounds, options.seed))
    for turn, variant in interleaved(list(clients), num_rounds, options.seed):
        counted = turn - options.warmup
        with servers.only(variant):
            for ratio in (float(name) for index, name in ratios if index == turn):
                request = ask(clients[variant], question, number=number, ratio=ratio, turn=counted)
                number += 1
                if counted >= 0:
                    found[variant].append(request)
        whole = sum(r.end - r.start for r in found[variant][-len(RATIOS) :])
        progress(f"round {counted + 1}/{options.rounds} {variant:5} {1e3 * whole:8.1f} ms")
    for client in clients.values():
        client.close()
    return found


def _load(servers: StageServers, options: argparse.Namespace) -> list[Load]:
    question = question_of(options)
    counts = {"connections": options.saturated, "posts": options.posts}
    first = 1_000_000  # of posts: none of the rounds before
    with servers.only(TIMED):
        saturate(servers, question, ratio=1.0, first=first, **counts)  # warm-up
        return [
            saturate(servers, question, ratio=ratio, first=first * (2 + index), **counts)
            for index, ratio in enumerate(RATIOS)
        ]
