"""Constant load that does not wait for answers: a seeded schedule, sent when it says."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One intended request.

    Attributes:
        number: rises from 0.
        at_s: when it is to be sent, after the start.
        kind: what is sent.
    """

    number: int
    at_s: float
    kind: str


def arrivals(rate: float, mixture: Mapping[str, float], seed: int) -> Iterator[Arrival]:
    """A Poisson process of `rate` requests a second without end; kinds by their weights."""
    rng = np.random.default_rng(seed)
    kinds, weights = list(mixture), np.array(list(mixture.values()), float)
    at_s = 0.0
    for number in itertools.count():
        at_s += rng.exponential(1 / rate)
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        yield Arrival(number=number, at_s=at_s, kind=kind)


class OpenLoop:
    """Sends each arrival at its time, whatever became of those before.

    Args:
        schedule: what to send when.
        send: sends one and notes what came of it.
        most_in_flight: further ones are dropped and counted: a generator that waited would hide
            the very stall it is there to measure.
    """

    def __init__(
        self,
        schedule: Iterator[Arrival],
        send: Callable[[Arrival], Awaitable[None]],
        most_in_flight: int,
    ) -> None:
        self._schedule, self._send, self._most = schedule, send, most_in_flight
        self._in_flight: set[asyncio.Task[None]] = set()
        self.dropped: list[Arrival] = []
        self.worst_lag_s = 0.0
        self.started = time.monotonic()

    @property
    def num_in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._in_flight)

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    async def run(self, stop: asyncio.Event) -> None:
        """Sends until `stop`, then waits for what is in flight."""
        self.started = time.monotonic()
        for arrival in self._schedule:
            if await self._stopped_before(arrival.at_s, stop):
                break
            self.worst_lag_s = max(self.worst_lag_s, self.now_s - arrival.at_s)
            if len(self._in_flight) >= self._most:
                self.dropped.append(arrival)
                continue
            self.send_now(arrival)
        await asyncio.gather(*self._in_flight)

    def send_now(self, arrival: Arrival) -> None:
        """Sends one, of the schedule or beside it."""
        task = asyncio.ensure_future(self._send(arrival))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _stopped_before(self, at_s: float, stop: asyncio.Event) -> bool:
        try:
            async with asyncio.timeout(max(0.0, at_s - self.now_s)):
                await stop.wait()
        except TimeoutError:
            return False
        return True
