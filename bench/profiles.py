"""Arrival schedules of open-loop load: phases of a rate, and when each request is due.

A schedule never looks at answers: a generator that waits for them hides the stalls it is there to
measure. The same phases, seed and spacing give the same schedule.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPACINGS = ("poisson", "even")


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


def schedule(phases: Sequence[Phase], seed: int, spacing: str = "poisson") -> list[Arrival]:
    """Every arrival in order.

    A Poisson process is one of rate 1, stretched so that it has the rate asked at each moment; an
    even schedule has one request at every half of a whole count.
    """
    assert spacing in SPACINGS
    rng = np.random.default_rng(seed)
    found, begin_s = [], 0.0
    for phase in phases:
        counts = _counts(phase.mean_count, rng if spacing == "poisson" else None)
        at_s = np.sort(np.concatenate([phase.times(counts), np.asarray(phase.at_s, float)]))
        found += [Arrival(at_s=begin_s + float(at), phase=phase.name) for at in at_s]
        begin_s += phase.seconds
    return found


def _counts(mean_count: float, rng: np.random.Generator | None) -> NDArray[np.float64]:
    if rng is None:
        return np.arange(int(mean_count + 0.5), dtype=np.float64) + 0.5
    return np.sort(rng.uniform(0.0, mean_count, rng.poisson(mean_count)))


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
    "once": once,
}
