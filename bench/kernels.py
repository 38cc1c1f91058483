"""Where a worker's time goes: GPU kernels, or operators on the CPU, of a profiler's trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.outcome import BenchError

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel or operator.

    Attributes:
        name: as the profiler has it.
        ms: its own time, without what it calls.
        calls: how often it ran.
    """

    name: str
    ms: float
    calls: int


def read_kernels(folder: Path, prefix: str) -> list[Kernel]:
    """The kernels of a profile by their time, the longest first.

    Args:
        folder: where vLLM's torch profiler writes.
        prefix: of the profile; the worker's trace is the one with the most work.

    Raises:
        BenchError: there is no trace.
    """
    traces = sorted(folder.glob(f"*{prefix}*.json"))
    found = [summed(json.loads(path.read_text())["traceEvents"]) for path in traces]
    if not any(found):
        raise BenchError(f"the profiler left no trace of {prefix!r} in {folder}")
    return max(found, key=lambda kernels: sum(kernel.ms for kernel in kernels))


def summed(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """Time by name: of GPU kernels where there are any, else of operators without their callees."""
    timed = [event for event in events if event.get("ph") == "X"]
    on_gpu = [(event["name"], event["dur"]) for event in timed if event.get("cat") in _GPU]
    durations: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in on_gpu or _own_times(timed):
        durations[name].append(microseconds)
    kernels = [Kernel(name=n, ms=sum(d) / 1e3, calls=len(d)) for n, d in durations.items()]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def _own_times(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Microseconds of each operator that no operator within it took, thread by thread."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    for found in threads.values():
        open_calls: list[list[Any]] = []  # [name, end, own microseconds]
        for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
            while open_calls and open_calls[-1][1] <= event["ts"]:
                name, _, own = open_calls.pop()
                yield name, own
            if open_calls:
                open_calls[-1][2] -= event["dur"]
            open_calls.append([event["name"], event["ts"] + event["dur"], event["dur"]])
        yield from ((name, own) for name, _, own in open_calls)
