"""This checkout's server beside another checkout's: what a change brought.

Two servers, one from each checkout (`git worktree add ../before COMMIT`), with the same checkpoint
and settings; or of one checkout, with --variables that only one of them has. In each round both get
posts with pictures never seen before, in an order drawn anew: first one at a time, for latency,
then a block with --connections at once, for throughput. --labels posts are asked of both, and their
labels and probabilities compared.

Goal: over 1 for a change that is meant to pay, labels and probabilities equal. Three minutes on the
demo.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.outcome import BenchError, Outcome, positive, progress
from bench.stage_load import send_all
from bench.stage_server import DEMO_MODEL, MODELS, Client, StageServers, stage_servers
from bench.stages import question_of
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from serving.structures import STRUCTURES

NOW, THEN = "this", "other"
ALONE, AT_ONCE = "one at a time", "at once"
ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--checkout", type=Path, default=ROOT, help="the other's folder (default this one)")
    add("--variables", nargs="+", default=[], metavar="NAME=VALUE", help="of this side only")
    add("--model", choices=MODELS, default=DEMO_MODEL, help=f"default {DEMO_MODEL}")
    add("--structure", default="llavac", choices=sorted(STRUCTURES), help="default llavac")
    add("--retention", type=float, default=0.4, help="of all posts (default 0.4)")
    add("--cascade", action="store_true", help="ask a cascade: --retention, then always 1.0")
    add("--rounds", type=positive, default=12, help="timed rounds (default 12)")
    add("--warmup", type=positive, default=2, help="rounds before, not counted (default 2)")
    add("--block", type=positive, default=32, help="posts at once a round (default 32)")
    add("--alone", type=positive, default=6, help="posts one at a time a round (default 6)")
    add("--connections", type=positive, default=16, help="at once (default 16)")
    add("--picture", type=positive, nargs=2, default=(640, 480), help="size (default 640 480)")
    add("--labels", type=int, default=24, help="posts whose answers are compared (default 24)")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache on CPU (default 1)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts both servers and lets them alternate."""
    other = options.checkout.resolve()
    if not (other / "serving" / "__main__.py").is_file():
        raise BenchError(f"--checkout {options.checkout}: no serving/ there; give a checkout")
    variables = _variables(options.variables)
    if other == ROOT and not variables:
        raise BenchError("both servers would be the same; give --checkout or --variables")
    arguments = ["--kv-cache-gib", str(options.kv_cache_gib)]
    sides = {NOW: (ROOT, variables), THEN: (other, {})}
    with tempfile.TemporaryDirectory(prefix="sieve-before-") as name:
        folder = Path(name)
        with stage_servers(folder, options.model, [NOW, THEN], arguments, sides) as servers:
            off = _largest_difference(servers, options)
            samples = _time_in_turn(servers, options)
    return summarise(samples, off, options)


def _variables(asked: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in asked:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise BenchError(f"--variables {each!r}: NAME=VALUE, e.g. OMP_WAIT_POLICY=PASSIVE")
        found[name] = value
    return found


def _bodies(options: argparse.Namespace, first: int, count: int) -> list[bytes]:
    cascade = (options.retention, 1.0) if options.cascade else None
    question = question_of(options)
    return [
        question.body(number, options.retention, cascade=cascade)
        for number in range(first, first + count)
    ]


def _largest_difference(servers: StageServers, options: argparse.Namespace) -> float | None:
    """Of any label's probability between both servers' answers to the same posts.

    Raises:
        BenchError: they answer with other labels.
    """
    clients = {variant: Client(port) for variant, port in servers.ports.items()}
    worst = None
    for body in _bodies(options, 2_000_000, options.labels):
        now, then = (clients[variant].label(body)[3] for variant in (NOW, THEN))
        if now["labels"] != then["labels"]:
            raise BenchError(
                f"the checkouts answer the same post with {now['labels']} and {then['labels']}"
            )
        gaps = [
            abs(share - then["probabilities"][field][label])
            for field, shares in now["probabilities"].items()
            for label, share in shares.items()
        ]
        worst = max([*gaps, worst or 0.0])
    for client in clients.values():
        client.close()
    return worst


def _time_in_turn(servers: StageServers, options: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    first = 0
    for turn, side in interleaved((NOW, THEN), options.warmup + options.rounds, options.seed):
        few = _bodies(options, first, options.alone)
        many = _bodies(options, first + options.alone, options.block)
        first += options.alone + options.block
        with servers.only(side):
            alone = _seconds(servers.ports[side], few, 1)
            at_once = _seconds(servers.ports[side], many, options.connections)
        counted = turn - options.warmup
        rate = options.block / at_once
        progress(
            f"round {counted + 1}/{options.rounds} {side:5} {1e3 * alone / options.alone:7.1f} ms "
            f"one at a time, {rate:6.1f}/s at once"
        )
        if counted >= 0:
            samples.append(Sample(round=counted, variant=f"{ALONE}/{side}", seconds=alone))
            samples.append(Sample(round=counted, variant=f"{AT_ONCE}/{side}", seconds=at_once))
    return samples


def _seconds(port: int, bodies: Sequence[bytes], connections: int) -> float:
    started = time.perf_counter()
    send_all(port, bodies, connections)
    return time.perf_counter() - started


def summarise(samples: Sequence[Sample], off: float | None, options: argparse.Namespace) -> Outcome:
    """Times of a post on both, and how many times as fast this checkout is."""
    seconds = by_variant(samples)
    rows: list[list[object]] = []
    results: dict[str, object] = {"largest_difference_of_a_probability": off}
    for load, count in ((ALONE, options.alone), (AT_ONCE, options.block)):
        now, then = (seconds[f"{load}/{side}"] for side in (NOW, THEN))
        faster = paired_ratio(then, now)
        each = {side: 1e3 * median(seconds[f"{load}/{side}"]) / count for side in (NOW, THEN)}
        rows.append([load, f"{each[NOW]:.2f}", f"{each[THEN]:.2f}", faster])
        results[load] = {"ms_a_post": each, "faster": vars(faster)}
    compared = (
        "answers were not compared (--labels 0)"
        if off is None
        else f"{options.labels} posts asked of both: same labels, probabilities within {off:.1e}"
    )
    what = "cascade to 1.0" if options.cascade else "one pass"
    this = " ".join(["This checkout", *options.variables])
    return Outcome(
        title=f"{this} beside {options.checkout.resolve().name} at {options.model}, "
        f"{options.structure}, retention {options.retention:g}, {what}: {options.rounds} rounds",
        headers=["load", "ms a post", "the other's", "times as fast [95 %]"],
        rows=rows,
        notes=[compared, f"at once: {options.connections} connections"],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=samples,
    )
