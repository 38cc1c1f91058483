"""More load than the server can take: who is answered in time, who is told to come again.

Starts the demo server with small limits, finds its capacity in closed loop, then sends labels with
pictures that are in no cache in open loop at each share of it (--loads), in a Poisson schedule that
waits for nobody; times are from the intended arrival. `429` and `503` count those that were told
when to come again, `other` all else: 5xx of another kind, 503 without Retry-After, a connection
that broke. `deadline` is a 503 of a request that was let in and not answered in time. Meanwhile
/healthz is asked five times a second; memory is that of all the server's processes.

Goal: p99 of the answered stays under the server's deadline, nothing in `other` or `deadline`,
/healthz always green. Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from bench.arrivals import Arrival, OpenLoop, arrivals
from bench.contest import make_text
from bench.generator import PRIORITY
from bench.health import HealthWatch
from bench.outcome import BenchError, Outcome, positive, progress
from bench.pictures import picture_url
from bench.process_tree import usage
from bench.processes import Server, free_port, running
from bench.statistics import Sample

OK, BUSY, FULL, DEADLINE, OTHER = "ok", "429", "503", "deadline", "other"
_SIZE = (112, 112)
_NUM_PICTURES = 3000
"""In turn; the server's cache of images has room for 700, least recently used out first."""
_CALM_S = 3.0
_MOST_LAG_S = 1.0
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request.

    Attributes:
        outcome: `ok`, `429`, `503`, `deadline` or `other`.
        seconds: from its intended arrival to its end.
        retry_after_s: what a refusal said; None where it said nothing.
        detail: of `other`.
    """

    outcome: str
    seconds: float
    retry_after_s: int | None = None
    detail: str = ""


@dataclass(kw_only=True)
class Phase:
    """One load.

    Attributes:
        load: share of capacity.
        rate: requests a second.
        answers: of all that were sent.
        health_ms: of every look at /healthz; infinite where it was not green.
        rss: of the server's processes, before and some seconds after, in bytes.
        lag_s: most that the generator was late.
        dropped: arrivals that were not sent for too many in flight.
    """

    load: float
    rate: float
    answers: list[Answer] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    rss: tuple[int, int] = (0, 0)
    lag_s: float = 0.0
    dropped: int = 0

    def count(self, outcome: str) -> int:
        """How many came to that."""
        return sum(answer.outcome == outcome for answer in self.answers)

    def ms(self, percent: float) -> float:
        """A percentile of the answered."""
        seconds = [answer.seconds for answer in self.answers if answer.outcome == OK]
        return 1e3 * float(np.percentile(seconds, percent)) if seconds else float("nan")

    @property
    def retry_after(self) -> str:
        """Least and most of what refusals said."""
        said = [one.retry_after_s for one in self.answers if one.retry_after_s is not None]
        return f"{min(said)} to {max(said)}" if said else "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--loads", nargs="+", type=float, default=[1, 2, 10], metavar="X", help="default 1 2 10")
    add("--seconds", type=positive, default=20, help="of each load (default 20)")
    add("--capacity-seconds", type=positive, default=10, help="of closed loop (default 10)")
    add("--home", choices=("process", "ray"), default="process", help="default process")
    add("--images", type=positive, default=8, help="in a request (default 8)")
    add("--max-pending", type=positive, default=64, help="of the server (default 64)")
    add("--max-queued-tokens", type=positive, default=16000, help="of the server (default 16000)")
    add("--max-num-seqs", type=positive, default=16, help="of the server (default 16)")
    add("--deadline", type=positive, default=20, help="--request-timeout-s (default 20)")
    add("--in-flight", type=positive, default=1000, help="most requests at once (default 1000)")
    add("--logs", type=Path, help="existing folder for the server's log (default a fresh one)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the server and loads it."""
    if options.logs is not None and not options.logs.is_dir():
        raise BenchError(f"--logs {options.logs}: no such folder")
    folder = options.logs or Path(tempfile.mkdtemp(prefix="sieve-overload-"))
    server = _server(options)
    posts = _Posts(options.seed, options.images)
    phases: list[Phase] = []
    try:
        with running([server], folder) as (pid,):
            with contextlib.suppress(PermissionError):  # clients would be on other machines
                os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
            capacity = asyncio.run(_capacity(server.url, posts, options))
            progress(f"capacity {capacity:.1f} requests/s")
            for load in options.loads:
                phases.append(_loaded(server.url, pid, load, load * capacity, posts, options))
                progress(_line(phases[-1]))
    finally:
        if options.logs is None:
            shutil.rmtree(folder, ignore_errors=True)
    return summarise(phases, capacity, options)


def _server(options: argparse.Namespace) -> Server:
    port = free_port()
    names = ("max_pending", "max_queued_tokens", "max_num_seqs")
    limits = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    ray = ["--ray", "--replicas=1", "--ray-cpus=16"] if options.home == "ray" else []
    return Server(
        name="demo",
        arguments=[
            *("-m", "serving", f"--port={port}", "--no-prefix-caching"),
            f"--request-timeout-s={options.deadline}",
            f"--max-images={options.images}",
            "--image-cache-gib=0.1",  # it would fill up meanwhile, and look like a leak
            *limits,
            *ray,
        ],
        port=port,
        ready_path="/readyz",
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",  # the HTTP side and the generator have a core, too
            "RAY_AUTH_MODE": "disabled",
        },
    )


class _Posts:
    """Labelling requests, encoded, each with images that no cache of the server still holds."""

    def __init__(self, seed: int, num_images: int) -> None:
        progress(f"encoding {_NUM_PICTURES} pictures ...")
        pictures = [picture_url(seed, index, _SIZE) for index in range(_NUM_PICTURES)]
        self._pictures = itertools.cycle(pictures)
        self._seed, self._num_images, self._numbers = seed, num_images, itertools.count()

    def fresh(self) -> bytes:
        number = next(self._numbers)
        images = list(itertools.islice(self._pictures, self._num_images))
        return json.dumps({"text": make_text(self._seed, number), "image": images}).encode()

    def block(self, size: int) -> list[bytes]:
        return [self.fresh() for _ in range(size)]


async def _capacity(url: str, posts: _Posts, options: argparse.Namespace) -> float:
    """Requests a second with as many connections as are served at once."""
    async with _session(url, options) as session:
        counts: Counter[str] = Counter()
        block = iter(posts.block(200 * options.capacity_seconds))

        async def work(until: float) -> None:
            while time.monotonic() < until:
                answer = await _sent(session, next(block), time.monotonic())
                counts[answer.outcome] += 1

        async def all_of(seconds: float) -> None:
            counts.clear()
            until = time.monotonic() + seconds
            await asyncio.gather(*(work(until) for _ in range(options.max_num_seqs)))

        await all_of(3)  # warm
        started = time.monotonic()
        await all_of(options.capacity_seconds)
        if not counts[OK]:
            raise BenchError(f"no request was answered in closed loop: {dict(counts)}")
        return counts[OK] / (time.monotonic() - started)


def _session(url: str, options: argparse.Namespace) -> aiohttp.ClientSession:
    """Not httpx: hundreds of requests a second would take a whole core of the server's."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=4 * options.deadline),
        headers={"Content-Type": "application/json"},
    )


def _loaded(
    url: str, pid: int, load: float, rate: float, posts: _Posts, options: argparse.Namespace
) -> Phase:
    progress(f"{load:g} times capacity: {rate:.0f} requests/s for {options.seconds} s ...")
    phase = Phase(load=load, rate=rate)
    bodies = posts.block(int(1.3 * rate * options.seconds) + 50)  # encoded before the clock starts
    before = usage(pid).rss
    with HealthWatch(url) as health:
        asyncio.run(_send_all(url, phase, bodies, options))
    phase.health_ms = health.looks_ms
    time.sleep(_CALM_S)
    phase.rss = (before, usage(pid).rss)
    return phase


async def _send_all(
    url: str, phase: Phase, bodies: Sequence[bytes], options: argparse.Namespace
) -> None:
    async with _session(url, options) as session:

        async def send(arrival: Arrival) -> None:
            due = loop.started + arrival.at_s
            phase.answers.append(await _sent(session, bodies[arrival.number], due))

        seed = options.seed + round(100 * phase.load)
        schedule = arrivals(phase.rate, {"label": 1.0}, seed)
        loop = OpenLoop(_of_time(schedule, options.seconds), send, options.in_flight)
        await loop.run(asyncio.Event())
        phase.lag_s, phase.dropped = loop.worst_lag_s, len(loop.dropped)


def _of_time(schedule: Iterator[Arrival], seconds: float) -> Iterator[Arrival]:
    return itertools.takewhile(lambda arrival: arrival.at_s < seconds, schedule)


async def _sent(session: aiohttp.ClientSession, body: bytes, due: float) -> Answer:
    try:
        async with session.post("/v1/label", data=body) as response:
            text, status = await response.text(), response.status
            said = response.headers.get("Retry-After", "")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(outcome=OTHER, seconds=time.monotonic() - due, detail=repr(error))
    return judged(status, said, text, time.monotonic() - due)


def judged(status: int, said: str, text: str, seconds: float) -> Answer:
    """What an answer is.

    Args:
        status: of HTTP.
        said: its `Retry-After`.
        text: its body.
        seconds: from its intended arrival.
    """
    if status == 200:
        return Answer(outcome=OK, seconds=seconds)
    if status not in (429, 503) or not said.isdecimal():
        return Answer(outcome=OTHER, seconds=seconds, detail=f"{status} {text[:200]}")
    outcome = BUSY if status == 429 else DEADLINE if "deadline_exceeded" in text else FULL
    return Answer(outcome=outcome, seconds=seconds, retry_after_s=int(said))


def _line(phase: Phase) -> str:
    counts = dict(Counter(answer.outcome for answer in phase.answers))
    return f"{phase.load:g}x: {counts}, p99 {phase.ms(99):.0f} ms"


def summarise(phases: Sequence[Phase], capacity: float, options: argparse.Namespace) -> Outcome:
    """A row a load."""
    outcomes = (OK, BUSY, FULL, DEADLINE, OTHER)
    rows = [
        [
            f"{phase.load:g}x",
            len(phase.answers),
            *(phase.count(outcome) for outcome in outcomes),
            f"{phase.count(OK) / options.seconds:.1f}",
            " / ".join(f"{phase.ms(percent):.0f}" for percent in (50, 95, 99)),
            phase.retry_after,
            _health(phase),
            " / ".join(f"{rss / _MIB:.0f}" for rss in phase.rss),
        ]
        for phase in phases
    ]
    return Outcome(
        title=f"Overload ({options.home}): capacity {capacity:.1f} requests/s in closed loop, "
        f"{options.seconds} s a load, deadline {options.deadline} s",
        headers=[
            *("load", "sent", *outcomes, "ok/s", "ok p50 / p95 / p99 ms", "Retry-After s"),
            *("healthz p99 ms", "MiB before / after"),
        ],
        rows=rows,
        notes=_notes(phases, options),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={"capacity": capacity, "phases": [_as_json(phase) for phase in phases]},
        samples=[
            Sample(round=index, variant=f"{phase.load:g}x/{answer.outcome}", seconds=answer.seconds)
            for phase in phases
            for index, answer in enumerate(phase.answers)
        ],
    )


def _health(phase: Phase) -> str:
    if not phase.health_ms:
        return "-"
    red = sum(ms == float("inf") for ms in phase.health_ms)
    return f"{red} red" if red else f"{np.percentile(phase.health_ms, 99):.0f}"


def _as_json(phase: Phase) -> dict[str, Any]:
    plain = asdict(phase)
    plain["health_ms"] = [ms if np.isfinite(ms) else None for ms in phase.health_ms]
    return plain


def _notes(phases: Sequence[Phase], options: argparse.Namespace) -> list[str]:
    met = all(
        phase.count(OTHER) + phase.count(DEADLINE) == 0
        and phase.ms(99) < 1e3 * options.deadline
        and np.isfinite(phase.health_ms).all()
        for phase in phases
    )
    worst = max((phase.lag_s for phase in phases), default=0.0)
    dropped = sum(phase.dropped for phase in phases)
    if worst > _MOST_LAG_S:
        met = False
    notes = [
        f"goal {'met' if met else 'missed'}: answered within the deadline, nothing else than "
        "refusals with Retry-After, health green"
        + (f"; void, the generator was over {_MOST_LAG_S:g} s late" if worst > _MOST_LAG_S else ""),
        f"the generator shares the server's cores; it was {worst:.2f} s late at most and left out "
        f"{dropped} requests with {options.in_flight} in flight",
    ]
    details = Counter(one.detail for phase in phases for one in phase.answers if one.detail)
    return notes + [f"other, {count} times: {what}" for what, count in details.most_common(5)]
