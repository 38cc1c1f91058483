"""Our HTTP server at ratio 1.0 beside vLLM's own OpenAI server.

Starts `python -m serving` and vLLM's server (stock architecture, no plugin) on the same
checkpoint with the same dtype, limits, adapters and thread binding, both without prefix cache,
and stops them at the end, on Ctrl-C too. Load alternates between them in short closed-loop
blocks; the servers of a round get the same posts, whose images neither has seen. Workloads:

  label   our POST /v1/label, one label with probabilities, against the same prompt through vLLM's
          chat with structured_outputs.choice and as many decoded tokens
  choice  the same chat with structured_outputs.choice on both
  chat    a plain greedy chat of one token on both

Goal: >= 0.9 of vLLM's rate. Three minutes on two cores, one of them start-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.contest import (
    OURS,
    THEIRS,
    WORKLOADS,
    Contest,
    Posts,
    closed_loop,
    our_server,
    probe,
    their_server,
)
from bench.outcome import BenchError, Outcome, positive, progress
from bench.processes import Server, running
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from serving.settings import DEMO, Settings

GOAL = 0.9
_SIZE = (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--model", default=str(DEMO / "base"), help="checkpoint folder (default the demo)")
    add("--adapters", type=Path, help="adapters folder (default the demo's with the demo)")
    add("--ask", help="model or adapter that requests name (default the base model)")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    add("--rounds", type=positive, default=12, help="timed rounds a workload (default 12)")
    add("--warmup", type=positive, default=2, help="rounds before, not counted (default 2)")
    add("--block", type=positive, default=32, help="requests in a block (default 32)")
    add("--concurrency", type=positive, default=8, help="requests at once (default 8)")
    add("--max-num-seqs", type=positive, default=64, help="of both engines (default 64)")
    add("--threads", type=positive, default=1, help="threads of each engine on CPU (default 1)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default auto")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache of each on CPU (default 1)")
    add("--logs", type=Path, help="existing folder for the servers' logs (default a fresh one)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts both servers, runs the workloads, stops both."""
    if not (Path(options.model) / "config.json").is_file():
        raise BenchError(f"--model {options.model}: not a checkpoint folder (no config.json)")
    if options.logs is not None and not options.logs.is_dir():
        raise BenchError(f"--logs {options.logs}: no such folder")
    names = ("model", "adapters", "dtype", "max_num_seqs", "kv_cache_gib")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings = Settings(**chosen)
    makers = (our_server, their_server)
    servers = [make(settings, options.threads) for make in makers]
    logs = options.logs or Path(tempfile.mkdtemp(prefix="sieve-bench-"))
    with running(servers, logs):
        samples, notes = asyncio.run(_measure(servers, settings.served_name, options))
    return summarise(samples, notes, options)


async def _measure(
    servers: Sequence[Server], base: str, options: argparse.Namespace
) -> tuple[list[Sample], list[str]]:
    posts = Posts(options.seed, _SIZE)
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=options.concurrency)
        clients = {
            server.name: await stack.enter_async_context(
                httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False)
            )
            for server in servers
        }
        contest, notes = await probe(clients, options.ask or base, posts.fresh)
        samples: list[Sample] = []
        for workload in options.workloads:
            samples += await _time_workload(workload, contest, clients, posts, options)
    return samples, notes


async def _time_workload(
    workload: str,
    contest: Contest,
    clients: dict[str, httpx.AsyncClient],
    posts: Posts,
    options: argparse.Namespace,
) -> list[Sample]:
    samples = []
    order = interleaved((OURS, THEIRS), options.warmup + options.rounds, options.seed)
    for index, pair in itertools.groupby(order, key=lambda item: item[0]):
        block = posts.block(options.block)
        for _, side in pair:
            requests = [contest.request(workload, side, post) for post in block]
            seconds = await closed_loop(clients[side], requests, options.concurrency)
            counted = index - options.warmup
            if counted < 0:
                continue
            samples.append(Sample(round=counted, variant=f"{workload}/{side}", seconds=seconds))
            rate = options.block / seconds
            progress(f"{workload:6} round {counted + 1}/{options.rounds} {side:5} {rate:7.2f}/s")
    return samples


def summarise(
    samples: Sequence[Sample], notes: Sequence[str], options: argparse.Namespace
) -> Outcome:
    """Rates of both servers and their paired ratio, a row a workload."""
    seconds = by_variant(samples)
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for workload in options.workloads:
        ours, theirs = (seconds[f"{workload}/{side}"] for side in (OURS, THEIRS))
        ratio = paired_ratio(theirs, ours)
        rates = [options.block / median(each) for each in (ours, theirs)]
        rows.append([workload, *(f"{rate:.2f}" for rate in rates), ratio, _verdict(ratio.median)])
        results[workload] = {OURS: rates[0], THEIRS: rates[1], "ratio": vars(ratio)}
    return Outcome(
        title=f"Server: {options.concurrency} connections, blocks of {options.block}, "
        f"{options.rounds} rounds, retention 1.0",
        headers=["workload", "sieve /s", "vLLM /s", "sieve / vLLM [95 %]", f">= {GOAL}"],
        rows=rows,
        notes=[*notes, _sharing(options.threads)],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=samples,
    )


def _verdict(ratio: float) -> str:
    return "yes" if ratio >= GOAL else "no"


def _sharing(num_threads: int) -> str:
    num_cores = len(os.sched_getaffinity(0))
    return (
        f"both servers and the load share {num_cores} cores; on CPU each engine has "
        f"{num_threads} thread(s), not bound"
    )
