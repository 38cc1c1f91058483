"""What clients see while parts of the Ray home die or are replaced under load.

Starts a Ray of its own with two nodes on this machine and the application with real engines, and
keeps up open-loop load: a seeded Poisson schedule of labels (two adapters, base) and streamed
chats, sent when it says whatever became of earlier ones, timed from the intended arrival. Killing
drills strike within a volley of twelve more, so that every engine has work to lose. Drills:

  replica     SIGKILL of an engine replica's process
  engine      SIGKILL of its engine core
  hang        SIGSTOP of its worker: Serve sees nothing, its replica does after 10 s
  poison      a request that kills its engine from inside (SIGSEGV), sent until it is refused
  controller  SIGKILL of Serve's controller
  adapter     a new version of an adapter takes over while requests for it run
  update      the application is deployed again with another setting
  node        SIGKILL of the raylet of the node that is not the head

`failed` are accepted requests that were lost; apart from them: `refused` (429, or 503 with
Retry-After), `crashed` (in the same engine as the poison: engine_crashed, quarantined), `broken`
(started streams), `connection` (no answer from the proxy). `left` counts processes that outlived
the replica they belong to. Recovered is when as many engines run as before, other than those hit.

Goal: no failed request with two or more engines. Three minutes a drill on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from bench.answers import (
    FAILED,
    MIN_SAMPLES,
    OK,
    OUTCOMES,
    Answer,
    CounterGrowth,
    between,
    count,
    p95,
)
from bench.drills import DRILLS, Scene, left_behind, tally_of
from bench.load import TIMEOUT_S, Load
from bench.outcome import BenchError, Outcome, positive, progress
from bench.process_tree import is_alive
from bench.processes import free_port
from bench.statistics import Sample
from serving.client_key import bearer_headers
from serving.cluster.settings import RayAppSettings
from serving.settings import DEMO

if TYPE_CHECKING:
    from bench.two_nodes import RayHome

_RECOVERY_TIMEOUT_S = 300.0
_GRACE_S = 5.0
_MOST_LAG_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Run:
    """One drill's load and what came of it.

    Attributes:
        drill: its name.
        answers: of every request that was sent.
        struck_s: when it struck, after the start of the load.
        recovered_s: when it was over; None where it was not within five minutes.
        retried: requests that the ingress sent to another engine.
        dropped: arrivals that were not sent for too many in flight.
        lag_s: most that the generator was late.
        left: processes left behind.
        notes: of the drill.
    """

    drill: str
    answers: list[Answer]
    struck_s: float
    recovered_s: float | None
    retried: int
    dropped: int
    lag_s: float
    left: int
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--drills", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="DRILL")
    add("--rounds", type=positive, default=1, help="times each drill runs (default 1)")
    add("--rate", type=float, default=4.0, help="requests a second (default 4)")
    add("--before", type=positive, default=20, help="seconds of load before (default 20)")
    add("--after", type=positive, default=20, help="seconds of load after (default 20)")
    add("--replicas", type=positive, default=2, help="engines (default 2)")
    add("--max-num-seqs", type=positive, default=8, help="of each engine (default 8)")
    add("--in-flight", type=positive, default=200, help="most requests at once (default 200)")
    add("--node-cpus", type=positive, help="CPUs Ray believes a node has (default one to spare)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the application, strikes it drill after drill, stops it."""
    from bench.two_nodes import running_home

    if options.replicas < 2:
        raise BenchError(f"--replicas {options.replicas}: nothing survives below 2")
    runs: list[Run] = []
    folder = Path(tempfile.mkdtemp(prefix="sieve-faults-"))
    try:
        adapters = folder / "adapters"
        shutil.copytree(DEMO / "adapters", adapters)
        chosen: dict[str, Any] = {
            "adapters": str(adapters),
            "replicas": str(options.replicas),
            "max_num_seqs": options.max_num_seqs,
            "port": free_port(),
            "hang_timeout_s": 10.0,
        }
        settings = RayAppSettings(**chosen)
        with running_home(settings, options.node_cpus or options.replicas + 1) as home:
            asyncio.run(_all_drills(home, adapters, options, runs))
    except KeyboardInterrupt:
        if not runs:
            raise
        progress(f"interrupted after {len(runs)} drills")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return summarise(runs, options)


async def _all_drills(
    home: RayHome, adapters: Path, options: argparse.Namespace, runs: list[Run]
) -> None:
    ordered = [name for name in DRILLS if name in options.drills]
    for index, name in enumerate(ordered * options.rounds):
        limits = httpx.Limits(max_connections=options.in_flight + 10)
        async with httpx.AsyncClient(
            base_url=home.url,
            headers=bearer_headers(),
            timeout=TIMEOUT_S,
            limits=limits,
            trust_env=False,
        ) as client:
            load = Load(
                client,
                home.settings.served_name,
                options.rate,
                options.seed + index,
                options.in_flight,
            )
            scene = Scene(
                home=home,
                client=client,
                folder=adapters,
                probes=load.probes,
                volley=load.volley,
                in_flight=lambda load=load: load.loop.num_in_flight,  # type: ignore[misc]
            )
            runs.append(await _one_drill(name, scene, load, options))
        progress(_line(runs[-1]))


async def _one_drill(name: str, scene: Scene, load: Load, options: argparse.Namespace) -> Run:
    progress(f"{name}: load for {options.before} s ...")
    stop, growth = asyncio.Event(), CounterGrowth()
    watching = asyncio.create_task(_watch_retries(scene.client, growth))
    running = asyncio.create_task(load.loop.run(stop))
    try:
        await asyncio.sleep(options.before)
        struck_s = load.loop.now_s
        strike = await DRILLS[name](scene)
        recovered_s: float | None = load.loop.now_s
        if not strike.is_over:
            recovered_s = await _recovery(scene.home, strike.killed, load, options.replicas)
        await asyncio.sleep(max(options.after, _GRACE_S))
        stop.set()
        await running
        await asyncio.sleep(2.5)  # a last scrape
    finally:
        for task in (watching, running):
            task.cancel()
        await asyncio.gather(watching, running, return_exceptions=True)
    return Run(
        drill=name,
        answers=load.answers,
        struck_s=struck_s,
        recovered_s=recovered_s,
        retried=growth.total,
        dropped=len(load.loop.dropped),
        lag_s=load.loop.worst_lag_s,
        left=left_behind(strike.killed, is_alive),
        notes=strike.notes,
    )


async def _watch_retries(client: httpx.AsyncClient, growth: CounterGrowth) -> None:
    while True:
        with contextlib.suppress(httpx.HTTPError):  # it may be what was just killed
            growth.see("sieve_retries_total{", (await client.get("/metrics", timeout=10)).text)
        await asyncio.sleep(1.0)


async def _recovery(home: RayHome, killed: list[int], load: Load, num: int) -> float | None:
    """When as many engines run as before; those that were hit do not count."""
    deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
    while time.monotonic() < deadline:
        running = await asyncio.to_thread(home.replicas)
        if len([replica for replica in running if replica.pid not in killed]) >= num:
            return load.loop.now_s
        await asyncio.sleep(0.25)
    return None


def summarise(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """A row a drill."""
    headers = ["drill", "sent", *OUTCOMES, "retried", "left", "recovered s"]
    headers += ["p95 ms before", "during", "after"]
    return Outcome(
        title=f"Faults: {options.replicas} engines, {options.rate:g} requests/s open loop",
        headers=headers,
        rows=[_row(each) for each in runs],
        notes=[*_notes(runs), f"a p95 takes {MIN_SAMPLES} answers; n is how many there were"],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            f"{each.drill} {index}": {**asdict(each), "counts": count(each.answers)}
            for index, each in enumerate(runs)
        },
        samples=[
            Sample(round=index, variant=f"{each.drill}/{answer.kind}", seconds=answer.seconds)
            for index, each in enumerate(runs)
            for answer in each.answers
            if answer.outcome == OK
        ],
    )


def _row(run: Run) -> list[object]:
    end = run.recovered_s
    during = between(run.answers, run.struck_s, end or float("inf"))
    after = between(run.answers, end, float("inf")) if end is not None else []
    return [
        run.drill,
        len(run.answers),
        *count(run.answers).values(),
        run.retried,
        run.left,
        f"{end - run.struck_s:.1f}" if end is not None else "never",
        p95(between(run.answers, 0.0, run.struck_s)),
        p95(during),
        p95(after),
    ]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for run in runs:
        details = [
            f"{outcome}: {', '.join(found)}" for outcome, found in tally_of(run.answers).items()
        ]
        notes += [f"{run.drill}: {note}" for note in [*run.notes, *details]]
        if run.dropped:
            notes.append(f"{run.drill}: {run.dropped} arrivals dropped, too many were in flight")
        if run.lag_s > _MOST_LAG_S:
            notes.append(f"{run.drill}: the generator was late by up to {run.lag_s:.2f} s")
    lost = sum(count(run.answers)[FAILED] for run in runs)
    notes.append(f"goal, no failed request: {'met' if lost == 0 else f'missed by {lost}'}")
    return notes


def _line(run: Run) -> str:
    found = ", ".join(f"{number} {name}" for name, number in count(run.answers).items() if number)
    return f"{run.drill}: {found}; {run.retried} retried; {'; '.join(run.notes)}"
