"""The demo server for a long time: load, bad requests, leavers, adapters replaced; what grows.

Starts `python -m serving` with the demo and an adapters folder of its own. Its capacity is measured
in closed loop; then open-loop load at a share of it (labels of two adapters and the base, streamed
chats), with among them

  bad      requests of all kinds that must be refused (`bench.bad_requests`), each checked
  leave    labels and streams whose client leaves after 10 to 300 ms

while a new version of an adapter takes over every so often and the oldest folder goes. Resident
memory, open descriptors and threads of the server's processes are read every five seconds.

Before that every block of the KV cache is written once: its pages count as memory from then on.

Goal: no unexplained failure, a memory slope whose interval holds zero, descriptors and threads as
they were. Ends with 1 where a failure is unexplained.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np

from bench.answers import BROKEN, CONNECTION, FAILED, OK, REFUSED
from bench.arrivals import Arrival
from bench.bad_requests import BAD, BASE, BadRequest
from bench.contest import make_text
from bench.drills import write_turned_adapter
from bench.load import TIMEOUT_S, Load
from bench.outcome import BenchError, Outcome, positive, progress
from bench.process_tree import Usage, usage
from bench.processes import Server, free_port, running
from bench.statistics import Slope, slope
from serving.settings import DEMO

LEFT, WRONG = "left", "wrong"
"""Its client left; a bad request that was not refused as it should be."""
GOOD = {"llavac": 0.3, "sentiment": 0.3, "base": 0.2, "stream": 0.2}
_SAMPLE_S = 5.0
_HEAVY = ("body-70-mb", "label-picture-text-bomb", "chat-picture-text-bomb")
_REPLACED = "sentiment"
_KEPT_VERSIONS = 3
_WARM_SHARE = 0.2
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a soak saw.

    Attributes:
        rate: requests a second that were sent.
        capacity: requests a second in closed loop.
        counts: of requests by what they were and what came of them.
        details: what the failures said.
        dropped: arrivals that were not sent for too many in flight.
        replaced: adapter versions that took over.
        usages: seconds after the start, and what the server's processes held.
        left_over: requests that the server still worked on ten seconds after the last one.
    """

    rate: float
    capacity: float
    counts: Counter[tuple[str, str]]
    details: list[str]
    dropped: int
    replaced: int
    usages: list[tuple[float, Usage]]
    left_over: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="of load (default 20)")
    add("--share", type=float, default=0.8, help="of the measured capacity (default 0.8)")
    add("--bad", type=float, default=0.05, help="share of bad requests (default 0.05)")
    add("--leave", type=float, default=0.05, help="share of leaving clients (default 0.05)")
    add("--replace-s", type=float, default=30.0, help="seconds between versions (default 30)")
    add("--capacity-s", type=float, default=20.0, help="seconds to measure capacity (default 20)")
    add("--connections", type=positive, default=16, help="to measure capacity (default 16)")
    add("--in-flight", type=positive, default=200, help="most requests at once (default 200)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the server, loads it, stops it."""
    folder = Path(tempfile.mkdtemp(prefix="sieve-soak-"))
    try:
        adapters = Path(shutil.copytree(DEMO / "adapters", folder / "adapters"))
        port = free_port()
        server = Server(
            name="soak",
            arguments=["-m", "serving", "--port", str(port), "--adapters", str(adapters)],
            port=port,
            ready_path="/readyz",
            environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        with running([server], folder) as (pid,):
            return summarise(asyncio.run(_soak(server.url, pid, adapters, options)), options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class SoakLoad(Load):
    """Good load with bad requests and leaving clients among it; only counts are kept."""

    def __init__(self, client: httpx.AsyncClient, rate: float, options: argparse.Namespace) -> None:
        good = 1 - options.bad - options.leave
        mixture = {kind: good * weight for kind, weight in GOOD.items()}
        mixture |= {"bad": options.bad, "leave": options.leave}
        super().__init__(client, BASE, rate, options.seed, options.in_flight, mixture)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.details: list[str] = []
        self._random = random.Random(options.seed)
        self._bad = [request for name, request in BAD.items() if name not in _HEAVY]
        self._random.shuffle(self._bad)
        self._number = itertools.count()

    async def _send(self, arrival: Arrival) -> None:
        if arrival.kind == "bad":
            request = self._bad[next(self._number) % len(self._bad)]
            outcome, detail = await self._refused(request)
        elif arrival.kind == "leave":
            outcome, detail = await self._leaving(arrival)
        else:
            await super()._send(arrival)
            answer = self.answers.pop()
            self.probes.clear()
            outcome, detail = answer.outcome, f"{answer.kind}: {answer.detail}"
        self.counts[_group(arrival.kind), outcome] += 1
        if outcome in (FAILED, BROKEN, CONNECTION, WRONG) and len(self.details) < 50:
            self.details.append(f"{arrival.at_s:.0f} s: {outcome} {detail}")
            progress(self.details[-1])

    async def _refused(self, request: BadRequest) -> tuple[str, str]:
        body = await asyncio.to_thread(request.body)
        try:
            answer = await self._client.request(
                request.method, request.path, content=body, headers=request.headers
            )
        except httpx.TransportError as error:
            return CONNECTION, f"{request.name}: {error!r}"
        if answer.status_code in (429, 503) and "retry-after" in answer.headers:
            return REFUSED, ""
        if answer.status_code not in request.statuses:
            return WRONG, f"{request.name}: {answer.status_code} {answer.text[:200]}"
        return OK, ""

    async def _leaving(self, arrival: Arrival) -> tuple[str, str]:
        kind = "stream" if arrival.number % 2 else "base"
        asked = Arrival(number=arrival.number, at_s=arrival.at_s, kind=kind)
        try:
            async with asyncio.timeout(self._random.uniform(0.01, 0.3)):
                await super()._send(asked)
        except TimeoutError:
            return LEFT, ""
        answer = self.answers.pop()
        return answer.outcome, f"before it left: {answer.detail}"


def _group(kind: str) -> str:
    return kind if kind in ("bad", "leave") else "good"


async def _soak(url: str, pid: int, adapters: Path, options: argparse.Namespace) -> Run:
    limits = httpx.Limits(max_connections=options.in_flight + 10)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        await _fill_kv_cache(client, options.seed)
        capacity = await _capacity(client, options)
        rate = options.share * capacity
        progress(f"capacity {capacity:.1f}/s; {options.minutes:g} minutes at {rate:.1f}/s ...")
        load = SoakLoad(client, rate, options)
        stop = asyncio.Event()
        usages: list[tuple[float, Usage]] = []
        replacing = asyncio.create_task(_replace(client, adapters, options.replace_s))
        watching = asyncio.create_task(_watch(pid, usages, load))
        loading = asyncio.create_task(load.loop.run(stop))
        try:
            await asyncio.sleep(60 * options.minutes)
            stop.set()
            await loading
        finally:
            for task in (replacing, watching, loading):
                task.cancel()
            ended = await asyncio.gather(replacing, watching, loading, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        await asyncio.sleep(10)
        usages.append((load.loop.now_s, usage(pid)))
        return Run(
            rate=rate,
            capacity=capacity,
            counts=load.counts,
            details=load.details,
            dropped=len(load.loop.dropped),
            replaced=len(list(adapters.glob(".replaced-*"))),
            usages=usages,
            left_over=await _left_over(client),
        )


async def _fill_kv_cache(client: httpx.AsyncClient, seed: int) -> None:
    """Long posts that no cache has seen, until they have as many tokens as the KV cache."""
    info = next(
        line
        for line in (await client.get("/metrics")).text.splitlines()
        if line.startswith("vllm:cache_config_info{")
    )
    num_blocks, block_size = (
        int(re.search(rf'[{{,]{name}="(\d+)"', info)[1])  # type: ignore[index]
        for name in ("num_gpu_blocks", "block_size")
    )
    left, numbers = 1.05 * num_blocks * block_size, itertools.count()
    progress(f"writing the {num_blocks} blocks of the KV cache ...")

    async def ask() -> None:
        nonlocal left
        while left > 0:
            number = next(numbers)
            text = " ".join(make_text(seed, 1_000_000 + 100 * number + i) for i in range(100))
            answer = await client.post("/v1/label", json={"text": text})
            if answer.status_code != 200:
                raise BenchError(f"a long post was not labelled: {answer.text[:300]}")
            left -= answer.json()["usage"]["prompt_tokens"]

    await asyncio.gather(*(ask() for _ in range(4)))


async def _capacity(client: httpx.AsyncClient, options: argparse.Namespace) -> float:
    """Good requests a second in closed loop, after some that are not counted."""
    load = Load(client, BASE, 1.0, options.seed + 1, options.in_flight, GOOD)
    numbers = itertools.count()
    kinds = random.Random(options.seed).choices(list(GOOD), list(GOOD.values()), k=997)
    counted_from = time.monotonic() + options.capacity_s / 4
    ends = time.monotonic() + 1.25 * options.capacity_s
    num_before = 0

    async def ask() -> None:
        nonlocal num_before
        while time.monotonic() < ends:
            number = next(numbers)
            kind = kinds[number % len(kinds)]
            await load._send(Arrival(number=number, at_s=load.loop.now_s, kind=kind))
            if time.monotonic() < counted_from:
                num_before = len(load.answers)

    await asyncio.gather(*(ask() for _ in range(options.connections)))
    num_ok = sum(answer.outcome == OK for answer in load.answers[num_before:])
    return max(0.5, num_ok / (time.monotonic() - counted_from))


async def _replace(client: httpx.AsyncClient, adapters: Path, every_s: float) -> None:
    """A new version of an adapter now and then, for ever; older folders vanish."""
    source = DEMO / "adapters" / _REPLACED
    for number in itertools.count(2):
        await asyncio.sleep(every_s)
        target = adapters / f"{_REPLACED}@{number}"
        if number % 2:
            shutil.copytree(source, target)
        else:
            await asyncio.to_thread(write_turned_adapter, source, target)
        body = {"name": _REPLACED, "version": str(number)}
        answer = await client.post("/v1/adapters", json=body)
        if answer.status_code != 200:
            progress(f"version {number} was refused: {answer.text[:300]}")
            continue
        (adapters / f".replaced-{number}").touch()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(adapters / f"{_REPLACED}@{number - _KEPT_VERSIONS}")


async def _watch(pid: int, usages: list[tuple[float, Usage]], load: SoakLoad) -> None:
    while True:
        found = usage(pid)
        usages.append((load.loop.now_s, found))
        if len(usages) % 12 == 1:
            sent = load.counts.total()
            progress(
                f"{load.loop.now_s:5.0f} s: {sent} requests, {found.rss / _MIB:.0f} MiB, "
                f"{found.descriptors} descriptors, {found.threads} threads"
            )
        await asyncio.sleep(_SAMPLE_S)


async def _left_over(client: httpx.AsyncClient) -> int:
    lines = (await client.get("/metrics")).text.splitlines()
    names = ("sieve_pending_requests", "vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))


def summarise(run: Run, options: argparse.Namespace) -> Outcome:
    """What was sent and what came of it; what the processes held, first and last."""
    counts = run.counts
    unexplained = sum(
        number
        for (_, outcome), number in counts.items()
        if outcome in (FAILED, BROKEN, CONNECTION, WRONG)
    )
    busy = [each for each in run.usages[:-1] if each[0] >= _WARM_SHARE * 60 * options.minutes]
    memory = memory_slope(busy)
    rows: list[list[object]] = [
        ["sent", counts.total()],
        ["answered", counts["good", OK]],
        ["bad, refused as they should be", counts["bad", OK]],
        ["left", counts["leave", LEFT]],
        ["answered before they left", counts["leave", OK]],
        ["refused for load", sum(n for (_, outcome), n in counts.items() if outcome == REFUSED)],
        ["unexplained failures", unexplained],
        ["adapter versions that took over", run.replaced],
        ["still worked on 10 s later", run.left_over],
        ["memory slope, MiB/h [95 %]", memory],
        ["memory, MiB, first and last", _first_last(busy, "rss", _MIB)],
        ["grown by process, MiB", _grown(busy)],
        ["descriptors, first and last", _first_last(busy, "descriptors")],
        ["threads, first and last", _first_last(busy, "threads")],
        ["processes, first and last", _first_last(busy, "processes")],
    ]
    return Outcome(
        title=f"Soak: {options.minutes:g} minutes at {run.rate:.1f}/s, {options.share:.0%} of "
        f"{run.capacity:.1f}/s",
        headers=["what", "how much"],
        rows=rows,
        notes=_notes(run, memory),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            "counts": {f"{kind} {outcome}": n for (kind, outcome), n in sorted(counts.items())},
            "unexplained": unexplained,
            "memory_mib_per_hour": asdict(memory),
            "usages": [{"at_s": at, **asdict(each)} for at, each in run.usages],
        },
        samples=[],
        status=1 if unexplained else 0,
    )


def memory_slope(usages: list[tuple[float, Usage]]) -> Slope:
    """MiB an hour."""
    hours = [at / 3600 for at, _ in usages]
    return slope(hours, [each.rss / _MIB for _, each in usages])


def _first_last(usages: list[tuple[float, Usage]], name: str, unit: int = 1) -> str:
    values = [getattr(each, name) / unit for _, each in usages]
    fifth = max(1, len(values) // 5)
    return f"{np.median(values[:fifth]):.0f}, {np.median(values[-fifth:]):.0f}"


def _grown(usages: list[tuple[float, Usage]]) -> str:
    """Of processes that were there all the time, the largest growth first."""
    first, last = usages[0][1].rss_each, usages[-1][1].rss_each
    grown = sorted(((last[pid] - first[pid]) / _MIB for pid in first if pid in last), reverse=True)
    return ", ".join(f"{each:+.0f}" for each in grown)


def _notes(run: Run, memory: Slope) -> list[str]:
    noise = "within noise" if memory.is_noise else "growth beyond noise"
    notes = [
        f"memory: {noise}; all processes of the server, without the first {_WARM_SHARE:.0%}",
        "first and last are medians of a fifth of the time each",
    ]
    if run.dropped:
        notes.append(f"{run.dropped} arrivals were not sent: too many in flight")
    return [*notes, *run.details[:20]]
