"""How fast is it at each retention ratio, and what does that cost in accuracy?

Starts the demo server once (no prefix cache) and asks it with Locust, in this order:

  connections  closed loops at the highest and the lowest ratio until more connections give no more;
               they warm the server up
  drift        a block at ratio 1.0, and the same again at the very end
  rounds       every cell, a ratio with a selector, gets the same posts once a round, in an order
               drawn anew: posts/s, and accuracy and macro-F1 of these very answers
  goodput      for the selector `cls`: open loops at shares of each ratio's saturated rate, by
               bisection: the highest rate at which --goal-share of all requests are answered
               within --goal-ms, and latency against load

Posts are those of `python -m train posts`, labels known, or --data. Two pixels of a PNG are changed
by up to 15 of 255 for each request, so that no cache has seen it; how many images went through the
tower is shown. --out gets the report as Markdown, HTML, JSON and CSV and every request as a row.

Goal: a table that an expert believes. At least 5 runs a cell, intervals over rounds and posts,
differences paired, random and stride beside the method, no percentile of too few answers. Seven
to nine minutes on two cores (11,000 posts at 75 a second, 18 open loops and those made again).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import fits, report
from bench.cells import METHOD, Cell, cells_of
from bench.contest import our_server
from bench.environment import describe
from bench.flops import RATIOS
from bench.generator import Senders, write_rows
from bench.goodput import Goal
from bench.mix import Content, read_contents
from bench.outcome import BenchError, Outcome, positive, progress
from bench.processes import running
from bench.profiles import rate
from bench.roofline import number_type_of, probe_cpu, shape_of
from bench.sweep_results import summarise
from bench.sweeping import Found, Sweeper, find_connections, run_rounds, search_goodput
from patches.config import Retention
from serving.settings import DEMO, Settings

SELECTORS = (METHOD, "stride", "random")
_NUM_WARM = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R", help="with 1.0")
    add("--selectors", nargs="+", default=list(SELECTORS), metavar="NAME", help="cls stride random")
    add("--rounds", type=positive, default=5, help="runs of each cell (default 5)")
    add("--block", type=positive, default=134, help="posts of a run (default 134: 670, so a p99)")
    add("--connections", type=positive, help="of closed loops (default: searched)")
    add("--goal-ms", type=rate, default=500.0, help="latency that a rate must meet (default 500)")
    add("--goal-share", type=float, default=0.95, help="of requests that must (default 0.95)")
    add("--probe", type=positive, default=150, help="requests of an open loop (default 150)")
    add("--no-goodput", action="store_true", help="leave the open loops out")
    add("--data", help="labelled posts (default the demo's, made on the spot)")
    add("--field", help="whose labels count (default multimodal, or the answer's last)")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder (default runs/sweep)")
    server = parser.add_argument_group("server", "ignored with --server, but for --ask and --model")
    add = server.add_argument
    add("--server", help="URL of a server that runs (without prefix cache), instead of one's own")
    add("--model", default=str(DEMO / "base"), help="checkpoint folder (default the demo)")
    add("--adapters", type=Path, help="adapters folder (default the demo's with the demo)")
    add("--ask", help="model or adapter that answers (default llavac with the demo, or the base)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default auto")
    add("--threads", type=positive, default=1, help="of the engine on CPU (default 1)")
    add("--max-num-seqs", type=positive, default=64, help="of the engine (default 64)")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache on CPU (default 1)")
    add("--processes", type=positive, default=1, help="that send (default 1)")
    add("--timeout-s", type=positive, default=120, help="until a request is given up (120)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the server, sweeps, writes the report."""
    environment = describe(sys.argv[1:])
    cells = _cells(options)
    settings = _settings(options)
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sieve-sweep-"))
    try:
        posts = _posts(work, options)
        found = _measure(work, settings, cells, posts, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    machine = probe_cpu(number_type_of(options.model))
    outcome = summarise(found, cells, shape_of(options.model), machine, options)
    write_rows(options.out / "requests.csv", found.all_rows())
    report.write(options.out, {"environment": environment, **outcome.as_json()})
    progress(f"report: {options.out}/report.html, .md, .json; cells.csv, requests.csv")
    return outcome


def _cells(options: argparse.Namespace) -> list[Cell]:
    if 1.0 not in options.ratios:
        raise BenchError(f"--ratios {options.ratios}: 1.0 must be there, others stand beside it")
    if not 0 < options.goal_share < 1:
        raise BenchError(f"--goal-share {options.goal_share}: above 0 and below 1, such as 0.95")
    try:
        for ratio in options.ratios:
            for selector in options.selectors:
                Retention(ratio=ratio, selector=selector)
    except ValueError as error:
        raise BenchError(f"--ratios, --selectors: {error}") from error
    ratios = sorted(set(options.ratios), reverse=True)
    return cells_of(ratios, list(dict.fromkeys(options.selectors)))


def _settings(options: argparse.Namespace) -> Settings:
    if not (Path(options.model) / "config.json").is_file():
        raise BenchError(f"--model {options.model}: not a checkpoint folder (no config.json)")
    names = ("model", "adapters", "dtype", "max_num_seqs", "kv_cache_gib")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings = Settings(**chosen)
    options.ask = options.ask or ("llavac" if settings.is_demo else settings.served_name)
    return settings


def _posts(work: Path, options: argparse.Namespace) -> list[Content]:
    """Posts for the rounds, and a block more for drift."""
    count = (options.rounds + 1) * options.block
    data = options.data
    if data is None:
        progress(f"making {count} labelled posts ...")
        data = str(fits.write_posts(work / "posts", count, options.seed, "test"))
    found = read_contents(data, count)
    if len(found) < 2 * options.rounds:
        least = 2 * options.rounds
        raise BenchError(f"--data {data}: {len(found)} posts, {least} are the fewest for --rounds")
    return found


def _measure(
    work: Path,
    settings: Settings,
    cells: Sequence[Cell],
    posts: Sequence[Content],
    options: argparse.Namespace,
) -> Found:
    found = Found(posts={post.id: post for post in posts})
    senders = Senders(options.out / "generator.log", options.processes)
    with senders, _served(settings, options) as url:
        sweeper = Sweeper(url, senders, work, options.ask, options.timeout_s)
        levels = [cells[0], cells[-1]]
        found.connections = find_connections(sweeper, levels, posts[:_NUM_WARM], found)
        found.connections = options.connections or found.connections
        tower, images = sweeper.tower_images(), sweeper.num_images
        _sweep(sweeper, cells, posts, found, options)
        found.num_images = sweeper.num_images - images
        last = sweeper.tower_images()
        found.num_tower_images = None if last is None or tower is None else last - tower
    return found


@contextlib.contextmanager
def _served(settings: Settings, options: argparse.Namespace) -> Iterator[str]:
    """The URL of a server that answers."""
    if options.server is not None:
        yield options.server.rstrip("/")
        return
    server = our_server(settings, options.threads)
    with running([server], options.out):
        yield server.url


def _sweep(
    sweeper: Sweeper,
    cells: Sequence[Cell],
    posts: Sequence[Content],
    found: Found,
    options: argparse.Namespace,
) -> None:
    num_parts = options.rounds + 1
    *rounds, spare = (posts[part::num_parts] for part in range(num_parts))
    found.drift.append(sweeper.block(cells[0], spare, found.connections, "drift first"))
    run_rounds(sweeper, cells, rounds, options.seed, found)
    if not options.no_goodput:
        goal = Goal(ms=options.goal_ms, share=options.goal_share)
        searched = [cell for cell in cells if cell.selector == options.selectors[0]]
        probes = (list(posts) * (1 + options.probe // len(posts)))[: options.probe]
        search_goodput(sweeper, searched, probes, goal, options.seed, found)
    found.drift.append(sweeper.block(cells[0], spare, found.connections, "drift last"))
