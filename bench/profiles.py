"""Arrival schedules of open-loop load: phases of a rate, and when each request is due.

A schedule never looks at answers: a generator that waits for them hides the stalls it is there to
measure. The same phases, seed and spacing give the same schedule.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.outcome import BenchError, positive

SPACINGS = ("poisson", "even", "gamma")
BURSTINESS = 4.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of time whose rate is constant or changes linearly.

    Attributes:
        name: of its row in a table.
        seconds: how long it lasts.
        start: requests a second at its begin.
        end: requests a second at its end.
        at_s: further requests, each at so many seconds after the phase's begin.
    """

    name: str
    seconds: float
    start: float = 0.0
    end: float = 0.0
    at_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.seconds > 0
        assert self.start >= 0
        assert self.end >= 0
        assert all(0 <= at < self.seconds for at in self.at_s)

    @property
    def mean_count(self) -> float:
        """Requests that its rate makes on average."""
        return self.seconds * (self.start + self.end) / 2

    def times(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """When its rate has made so many requests, in seconds after its begin."""
        slope = (self.end - self.start) / self.seconds
        under_root = np.maximum(self.start**2 + 2 * slope * counts, 0.0)
        total = self.start + np.sqrt(under_root)
        return np.minimum(2 * counts / np.where(total > 0, total, 1.0), self.seconds)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request that is due.

    Attributes:
        at_s: seconds after the start of the run.
        phase: name of its phase.
    """

    at_s: float
    phase: str


def schedule(
    phases: Sequence[Phase], seed: int, spacing: str = "poisson", burstiness: float = BURSTINESS
) -> list[Arrival]:
    """Every arrival in order.

    A Poisson process is one of rate 1, stretched so that it has the rate asked at each moment; an
    even schedule has one request at every half of a whole count. Gamma bursts are gaps of a gamma
    distribution whose variance is `burstiness` times that of a Poisson process of the same rate:
    requests come in clusters with pauses between them.
    """
    assert spacing in SPACINGS
    assert burstiness > 0
    rng = np.random.default_rng(seed)
    found, begin_s = [], 0.0
    for phase in phases:
        counts = _COUNTS[spacing](phase.mean_count, rng, burstiness)
        at_s = np.sort(np.concatenate([phase.times(counts), np.asarray(phase.at_s, float)]))
        found += [Arrival(at_s=begin_s + float(at), phase=phase.name) for at in at_s]
        begin_s += phase.seconds
    return found


def _poisson(mean: float, rng: np.random.Generator, burstiness: float) -> NDArray[np.float64]:
    return np.sort(rng.uniform(0.0, mean, rng.poisson(mean)))


def _even(mean: float, rng: np.random.Generator, burstiness: float) -> NDArray[np.float64]:
    return np.arange(int(mean + 0.5), dtype=np.float64) + 0.5


def _gamma(mean: float, rng: np.random.Generator, burstiness: float) -> NDArray[np.float64]:
    found = np.empty(0)
    last = 0.0
    while last <= mean:
        gaps = rng.gamma(1 / burstiness, burstiness, int(mean) + 16)
        found = np.concatenate([found, last + np.cumsum(gaps)])
        last = float(found[-1])
    return found[found < mean]


_COUNTS = {"poisson": _poisson, "even": _even, "gamma": _gamma}


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Options of every profile."""
    group = parser.add_argument_group("profile")
    add = group.add_argument
    add("--profile", choices=sorted(PROFILES), default=default, help=f"default {default}")
    add("--low", type=rate, default=3.0, help="requests/s before and after (default 3)")
    add("--high", type=rate, default=15.0, help="requests/s on the plateau (default 15)")
    add("--before-s", type=positive, default=20, help="seconds before the ramp (default 20)")
    add("--slope-s", type=positive, default=40, help="seconds up, and down (default 40)")
    add("--plateau-s", type=positive, default=90, help="seconds at --high (default 90)")
    add("--after-s", type=positive, default=60, help="seconds after the ramp (default 60)")
    add("--steps", type=positive, default=4, help="of `step`, --low to --high (default 4)")
    add("--trace", type=Path, help="of `trace`: a CSV or JSONL with a column at_s or intended_s")
    add("--trace-speed", type=rate, default=1.0, help="times as fast as it was (default 1)")
    add("--spacing", choices=SPACINGS, default="poisson", help="of arrivals (default poisson)")
    help_ = f"variance of gamma gaps, in that of poisson's (default {BURSTINESS:g})"
    add("--burstiness", type=rate, default=BURSTINESS, help=help_)


def rate(text: str) -> float:
    """An argument that is a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def ramp(options: argparse.Namespace) -> list[Phase]:
    """Low, up, high, down, low again: long enough for engines to start, and to stop."""
    low, high, slope_s = options.low, options.high, options.slope_s
    return [
        Phase(name="before", seconds=options.before_s, start=low, end=low),
        Phase(name="up", seconds=slope_s, start=low, end=high),
        Phase(name="plateau", seconds=options.plateau_s, start=high, end=high),
        Phase(name="down", seconds=slope_s, start=high, end=low),
        Phase(name="after", seconds=options.after_s, start=low, end=low),
    ]


def constant(options: argparse.Namespace) -> list[Phase]:
    """One rate."""
    return [Phase(name="constant", seconds=options.plateau_s, start=options.high, end=options.high)]


def step(options: argparse.Namespace) -> list[Phase]:
    """Plateaus of rising rate, from low to high."""
    rates = np.linspace(options.low, options.high, options.steps)
    return [
        Phase(name=f"{each:.3g}/s", seconds=options.plateau_s, start=float(each), end=float(each))
        for each in rates
    ]


def trace(options: argparse.Namespace) -> list[Phase]:
    """Requests when those of a file were due, such as a requests.csv of an earlier run."""
    if options.trace is None:
        raise BenchError("--profile trace needs --trace FILE: a CSV or JSONL with a column at_s")
    at_s = read_trace(options.trace) / options.trace_speed
    return [Phase(name="trace", seconds=float(at_s[-1]) + 1.0, at_s=tuple(at_s.tolist()))]


def read_trace(path: Path) -> NDArray[np.float64]:
    """Times of a trace in order, the first at 0 seconds.

    Raises:
        BenchError: it is not there, has no such column, or a value that is no time.
    """
    if not path.is_file():
        raise BenchError(f"--trace {path}: no such file")
    found = []
    for number, row in enumerate(_trace_rows(path), 1):
        value = row.get("at_s", row.get("intended_s")) if isinstance(row, dict) else None
        try:
            found.append(float(value))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise BenchError(
                f"--trace {path}: row {number} has {str(value)[:40]!r} for a time; allowed are "
                "seconds in a column at_s or intended_s"
            ) from None
    times = np.sort(np.array(found))
    if times.size == 0 or not np.isfinite(times).all():
        raise BenchError(f"--trace {path}: needs at least one row, and finite seconds")
    return times - times[0]


def _trace_rows(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise BenchError(f"--trace {path}: line {number} is not JSON: {error}") from None


def once(options: argparse.Namespace) -> list[Phase]:
    """Silence, a single request, silence: from zero engines to one and back."""
    return [
        Phase(name="silence", seconds=options.before_s),
        Phase(name="one request", seconds=options.plateau_s, at_s=(0.0,)),
        Phase(name="after", seconds=options.after_s),
    ]


PROFILES: dict[str, Callable[[argparse.Namespace], list[Phase]]] = {
    "ramp": ramp,
    "constant": constant,
    "step": step,
    "trace": trace,
    "once": once,
}
