"""The highest rate that meets a latency goal: a bisection over shares of a saturated rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.generator import Request, void_reasons
from bench.latency import Share, percentile_ms

LOADS = tuple(round(0.28 + 0.11 * step, 2) for step in range(7))
"""Shares of the saturated rate, up to nearly full: three probes find the highest that meets."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a rate must meet.

    Attributes:
        ms: milliseconds from when a request was due to its answer.
        share: of all requests that were due, so many must be answered within that.
    """

    ms: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One open loop.

    Attributes:
        load: share of the saturated rate.
        rate: requests a second.
        rows: what became of them.
    """

    load: float
    rate: float
    rows: Sequence[Request]

    def within(self, goal: Goal) -> Share:
        """Of all that were due, how many were answered in time."""
        hits = sum(row.status == 200 and 1e3 * row.seconds <= goal.ms for row in self.rows)
        return Share(hits=hits, count=len(self.rows))

    def is_met(self, goal: Goal) -> bool:
        """Whether enough of them were."""
        return self.within(goal).value >= goal.share

    @property
    def void(self) -> list[str]:
        """Why it says nothing about the server."""
        return void_reasons(self.rows, len(self.rows))

    def as_json(self, goal: Goal) -> dict[str, object]:
        """For results."""
        answered = [row.seconds for row in self.rows if row.status == 200]
        within = self.within(goal)
        shares = {"value": within.value, "low": within.low, "high": within.high}
        percentiles = {
            f"p{percent}_ms": percentile_ms(answered, percent) for percent in (50, 90, 95, 99)
        }
        return {
            "load": self.load,
            "rate": self.rate,
            "n": len(self.rows),
            **percentiles,
            "within": shares,
            "meets": self.is_met(goal),
            "void": self.void,
        }


@dataclass(kw_only=True)
class Search:
    """A bisection over `LOADS`.

    Attributes:
        capacity: requests a second that saturate the server.
        goal: to be met.
        probes: those made so far.
    """

    capacity: float
    goal: Goal
    probes: list[Probe] = field(default_factory=list)
    _low: int = -1
    _high: int = len(LOADS)

    @property
    def next_load(self) -> float | None:
        """What to probe next; None at the end."""
        if self._high - self._low <= 1:
            return None
        return LOADS[(self._low + self._high) // 2]

    def add(self, probe: Probe) -> None:
        """Takes a probe of `next_load`; one that is void is kept, and to be made again."""
        assert probe.load == self.next_load
        self.probes.append(probe)
        if probe.void and not self._was_void(probe.load):
            return
        middle = LOADS.index(probe.load)
        if probe.is_met(self.goal):
            self._low = middle
        else:
            self._high = middle

    def _was_void(self, load: float) -> bool:
        return sum(probe.load == load for probe in self.probes) > 1

    def goodput(self) -> dict[str, object]:
        """The highest rate that met the goal, with its share; rate 0 where none did."""
        goal = {"goal_ms": self.goal.ms, "goal_share": self.goal.share}
        if self._low < 0:
            return {"rate": 0.0, **goal, "within": None, "void": []}
        best = [probe for probe in self.probes if probe.load == LOADS[self._low]][-1]
        return {"rate": best.rate, **goal, **_picked(best.as_json(self.goal))}


def _picked(found: dict[str, object]) -> dict[str, object]:
    return {name: found[name] for name in ("load", "within", "void")}
