"""What clients see while the one engine of a server dies or hangs, and while the server ends.

Starts the demo server and keeps up open-loop load: a seeded Poisson schedule of labels (two
adapters, base) and streamed chats, sent when it says whatever became of earlier ones, timed from
the intended arrival. Parts, in one server:

  kill    SIGKILL of the engine core
  worker  SIGKILL of its worker
  hang    SIGSTOP of its worker: noticed after --hang-timeout
  drain   SIGTERM of the server

Each strikes within a volley of requests, so that there is something to lose. `told` are those that
were told when to come again (429 or 503 with Retry-After, a stream by its last event), `lost` all
others without an answer; `gone` found nobody listening once the server had ended. Noticed is when
/readyz turned red, up when it was green again; for drain, when the process had ended. `left` counts
processes of an engine that outlived it.

Goal: nothing lost, a death noticed within two seconds. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from bench.answers import (
    BROKEN,
    CONNECTION,
    CRASHED,
    MIN_SAMPLES,
    OK,
    REFUSED,
    Answer,
    between,
    p95,
)
from bench.drills import tally_of
from bench.load import TIMEOUT_S, Load
from bench.outcome import BenchError, Outcome, positive, progress
from bench.process_tree import descendants, engine_core, is_alive, worker_of
from bench.processes import Server, free_port, running
from bench.statistics import Sample

PARTS = ("kill", "worker", "hang", "drain")
_LOOK_S = 0.1
_RECOVERY_TIMEOUT_S = 600.0
_BUSY, _BUSY_TIMEOUT_S = 12, 5.0
_KEPT_ALIVE_S = 2.0
"""Less than the server keeps idle connections: else some are closed as a request is on its way."""
_MOST_LAG_S = 0.25
_RETRYABLE_EVENTS = ("engine_restarting", "draining")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the probes answered at a time.

    Attributes:
        at_s: after the start of the load.
        is_ready: whether /readyz was green.
        health_ms: how long /healthz took; None where it did not answer with 200.
    """

    at_s: float
    is_ready: bool
    health_ms: float | None


@dataclass(kw_only=True)
class Run:
    """One part and what came of it.

    Attributes:
        part: its name.
        answers: of every request that was sent.
        struck_s: when it struck, after the start of the load.
        noticed_s: when /readyz turned red; None where it never did.
        over_s: when it was green again, or the server had ended; None where it never was.
        left: processes that outlived their engine.
        lag_s: most that the generator was late.
        dropped: arrivals that were not sent for too many in flight.
        looks: the probes.
        notes: for the reader.
    """

    part: str
    answers: list[Answer]
    struck_s: float
    noticed_s: float | None
    over_s: float | None
    left: int
    lag_s: float
    dropped: int
    looks: list[Look]
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--rate", type=float, default=5.0, help="requests a second (default 5)")
    add("--before", type=positive, default=12, help="seconds of load before (default 12)")
    add("--after", type=positive, default=12, help="seconds of load after (default 12)")
    add("--volley", type=positive, default=24, help="requests sent as it strikes (default 24)")
    add("--hang-timeout", type=float, default=5.0, help="of the server, in s (default 5)")
    add("--drain", type=float, default=30.0, help="of the server, in s (default 30)")
    add("--in-flight", type=positive, default=300, help="most requests at once (default 300)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the server and strikes it part after part."""
    folder = Path(tempfile.mkdtemp(prefix="sieve-outages-"))
    port, runs = free_port(), []
    server = Server(
        name="demo",
        arguments=[
            "-m",
            "serving",
            f"--port={port}",
            f"--hang-timeout-s={options.hang_timeout}",
            f"--drain-s={options.drain}",
        ],
        port=port,
        ready_path="/readyz",
        environment={"OMP_WAIT_POLICY": "PASSIVE"},
    )
    try:
        with running([server], folder):
            pid = _process_of(port)
            for index, part in enumerate(name for name in PARTS if name in options.parts):
                runs.append(asyncio.run(_one_part(part, server, pid, options, index)))
                progress(_line(runs[-1]))
                if runs[-1].over_s is None:
                    log = (folder / "demo.log").read_text(errors="replace")
                    progress(f"{part}: the server is not up again, its log ends:\n{log[-4000:]}")
                    break
    except KeyboardInterrupt:
        if not runs:
            raise
        progress(f"interrupted after {len(runs)} parts")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return summarise(runs, options)


def _process_of(port: int) -> int:
    """The server that we started on a port.

    Raises:
        BenchError: there is none.
    """
    for pid in descendants(os.getpid()):
        if f"--port={port}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            return pid
    raise BenchError(f"no server was started on port {port}")


async def _one_part(
    part: str, server: Server, pid: int, options: argparse.Namespace, index: int
) -> Run:
    progress(f"{part}: load for {options.before} s ...")
    limits = httpx.Limits(max_connections=options.in_flight + 10, keepalive_expiry=_KEPT_ALIVE_S)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        load = Load(client, "demo", options.rate, options.seed + index, options.in_flight)
        watch, stop = _Watch(server.url, load), asyncio.Event()
        watching = asyncio.create_task(watch.run())
        sending = asyncio.create_task(load.loop.run(stop))
        try:
            await asyncio.sleep(options.before)
            core = engine_core(pid)
            family = [core, *descendants(core)]
            load.volley(options.volley)
            await _until_busy(client, min(_BUSY, options.volley))
            note = f"struck with {load.loop.num_in_flight} requests in flight"
            struck_s = load.loop.now_s
            _strike(part, pid, core)
            over_s = await _over(part, watch, pid, struck_s)
            left = sum(map(is_alive, family))
            if part != "drain":
                await asyncio.sleep(options.after)
            stop.set()
            await sending
        finally:
            for task in (watching, sending):
                task.cancel()
            await asyncio.gather(watching, sending, return_exceptions=True)
    return Run(
        part=part,
        answers=load.answers,
        struck_s=struck_s,
        noticed_s=watch.red_after(struck_s),
        over_s=over_s,
        left=left,
        lag_s=load.loop.worst_lag_s,
        dropped=len(load.loop.dropped),
        looks=watch.looks,
        notes=[note],
    )


async def _until_busy(client: httpx.AsyncClient, number: int) -> None:
    """Waits until the server has accepted so many requests, or most were too quick for it."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while time.monotonic() < deadline:
        text = (await client.get("/metrics")).text
        lines = [x for x in text.splitlines() if x.startswith("sieve_pending_requests ")]
        if lines and float(lines[0].split()[1]) >= number:
            return
        await asyncio.sleep(0.01)


def _strike(part: str, pid: int, core: int) -> None:
    if part == "kill":
        os.kill(core, signal.SIGKILL)
    elif part == "worker":
        os.kill(worker_of(core), signal.SIGKILL)
    elif part == "hang":
        os.kill(worker_of(core), signal.SIGSTOP)
    else:
        os.kill(pid, signal.SIGTERM)


class _Watch:
    """Asks the probes ten times a second on connections of its own."""

    def __init__(self, url: str, load: Load) -> None:
        self._url, self._load = url, load
        self.looks: list[Look] = []

    async def run(self) -> None:
        """Looks for ever."""
        async with httpx.AsyncClient(base_url=self._url, timeout=30, trust_env=False) as client:
            while True:
                at_s, started = self._load.loop.now_s, time.perf_counter()
                is_healthy = await self._is_green(client, "/healthz")
                seconds = time.perf_counter() - started
                is_ready = await self._is_green(client, "/readyz")
                health_ms = 1e3 * seconds if is_healthy else None
                self.looks.append(Look(at_s=at_s, is_ready=is_ready, health_ms=health_ms))
                await asyncio.sleep(_LOOK_S)

    async def _is_green(self, client: httpx.AsyncClient, path: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await client.get(path)).status_code == 200
        return False

    def red_after(self, struck_s: float) -> float | None:
        """When /readyz was first red after that."""
        return next((o.at_s for o in self.looks if o.at_s > struck_s and not o.is_ready), None)

    def green_after(self, red_s: float) -> float | None:
        """When it was first green after that."""
        return next((o.at_s for o in self.looks if o.at_s > red_s and o.is_ready), None)


async def _over(part: str, watch: _Watch, pid: int, struck_s: float) -> float | None:
    """When the server was up again, or for drain had ended."""
    deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
    while time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_S)
        if part == "drain":
            if not is_alive(pid):
                return watch.looks[-1].at_s
            continue
        red_s = watch.red_after(struck_s)
        green_s = watch.green_after(red_s) if red_s is not None else None
        if green_s is not None:
            return green_s
    return None


def sort_out(answers: Sequence[Answer]) -> dict[str, int]:
    """How many were answered, told when to come again, found nobody listening, or are lost."""
    found = {"ok": 0, "told": 0, "gone": 0, "lost": 0}
    for answer in answers:
        found[_kind(answer)] += 1
    return found


def _kind(answer: Answer) -> str:
    if answer.outcome == OK:
        return "ok"
    if answer.outcome == REFUSED:
        return "told"
    if answer.outcome == CRASHED:  # 400 quarantined is for good
        return "told" if answer.detail.startswith("503") else "lost"
    if answer.outcome == BROKEN and answer.detail in _RETRYABLE_EVENTS:
        return "told"
    is_gone = answer.outcome == CONNECTION and answer.detail.startswith("ConnectError")
    return "gone" if is_gone else "lost"


def summarise(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """A row a part."""
    headers = ["part", "sent", "ok", "told", "gone", "lost", "noticed s", "up or ended s", "left"]
    headers += ["p95 ms before", "during", "after"]
    return Outcome(
        title=f"Outages: one server, {options.rate:g} requests/s open loop",
        headers=headers,
        rows=[_row(each) for each in runs],
        notes=[*_notes(runs), f"a p95 takes {MIN_SAMPLES} answers; n is how many there were"],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            each.part: {**asdict(each), "counts": sort_out(each.answers), "drain": _drained(each)}
            for each in runs
        },
        samples=[
            Sample(round=0, variant=f"{each.part}/{answer.kind}", seconds=answer.seconds)
            for each in runs
            for answer in each.answers
            if answer.outcome == OK
        ],
    )


def _row(each: Run) -> list[object]:
    end = each.over_s if each.part != "drain" else None
    during = between(each.answers, each.struck_s, end or float("inf"))
    return [
        each.part,
        len(each.answers),
        *sort_out(each.answers).values(),
        _seconds(each, each.noticed_s),
        _seconds(each, each.over_s),
        each.left,
        p95(between(each.answers, 0.0, each.struck_s)),
        p95(during),
        p95(between(each.answers, end, float("inf"))) if end is not None else "",
    ]


def _seconds(each: Run, at_s: float | None) -> str:
    return "never" if at_s is None else f"{at_s - each.struck_s:.1f}"


def _drained(each: Run) -> dict[str, dict[str, int]]:
    """Requests from before the signal apart from those after it."""
    return {
        "before": sort_out(between(each.answers, 0.0, each.struck_s)),
        "after": sort_out(between(each.answers, each.struck_s, float("inf"))),
    }


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for each in runs:
        found = tally_of(each.answers).items()
        details = [f"{outcome}: {', '.join(kinds)}" for outcome, kinds in found]
        notes += [f"{each.part}: {note}" for note in [*each.notes, _health(each), *details]]
        if each.part == "drain":
            notes.append(f"drain: sent before SIGTERM {_words(_drained(each)['before'])}")
            notes.append(f"drain: sent after it {_words(_drained(each)['after'])}")
        if each.dropped:
            notes.append(f"{each.part}: {each.dropped} arrivals dropped, too many were in flight")
        if each.lag_s > _MOST_LAG_S:
            notes.append(f"{each.part}: the generator was late by up to {each.lag_s:.2f} s")
    lost = sum(sort_out(each.answers)["lost"] for each in runs)
    notes.append(f"goal, nothing lost: {'met' if lost == 0 else f'missed by {lost}'}")
    return notes


def _health(each: Run) -> str:
    looks = each.looks
    if each.part == "drain":  # nobody listens in the end
        looks = list(itertools.dropwhile(lambda look: look.health_ms is None, looks[::-1]))
    answered = [look.health_ms for look in looks if look.health_ms is not None]
    slowest = f", the slowest after {max(answered):.0f} ms" if answered else ""
    return f"/healthz green {len(answered)} of {len(looks)} times{slowest}"


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "none"


def _line(each: Run) -> str:
    noticed, over = _seconds(each, each.noticed_s), _seconds(each, each.over_s)
    return f"{each.part}: {_words(sort_out(each.answers))}; noticed {noticed} s, over {over} s"
