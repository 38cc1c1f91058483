"""How long a request is worked on: while its client waits, until its deadline, if there is room."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request
from prometheus_client import Gauge

from serving.errors import DeadlineError, OverloadedError

T = TypeVar("T")


class Turnstile:
    """Bounds the requests of an HTTP side that are taken and not yet answered.

    Args:
        most: how many.
        pending: shows how many there are.
    """

    def __init__(self, most: int, pending: Gauge) -> None:
        self._most, self._pending = most, pending
        self._inside = 0
        self._mean_s = 1.0

    @contextmanager
    def passage(self) -> Iterator[None]:
        """One request's time inside.

        Raises:
            OverloadedError: it is full (429); `Retry-After` is when half of it will have left.
        """
        if self._inside >= self._most:
            error = OverloadedError(
                f"{self._inside} requests are pending, allowed are {self._most}; try again in "
                "the seconds that Retry-After says"
            )
            error.status, error.retry_after_s = 429, min(30, math.ceil(self._mean_s / 2))
            raise error
        with self.stay():
            yield

    @contextmanager
    def stay(self) -> Iterator[None]:
        """The time inside of one that was let in already."""
        self._inside += 1
        self._pending.set(self._inside)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._inside -= 1
            self._pending.set(self._inside)
            self._mean_s += 0.05 * (time.perf_counter() - started - self._mean_s)


class Deadline:
    """When a request is given up.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds left."""
        return max(0.0, self._ends - time.monotonic())

    def error(self) -> DeadlineError:
        """What its client is told."""
        return DeadlineError(
            f"not answered within {self._seconds:g} s and cancelled; the server is busy, try "
            "again shortly or with a larger timeout_s",
            param="timeout_s",
        )


async def until_answered(request: Request, deadline: Deadline, work: Awaitable[T]) -> T:
    """Awaits work, or cancels it as soon as the client leaves or the deadline passes.

    Raises:
        asyncio.CancelledError: the client left; nobody waits for an answer.
        DeadlineError: it took too long.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait(
            {task, leaving},
            return_when=asyncio.FIRST_COMPLETED,
            timeout=deadline.remaining_s,
        )
        if task.done():
            return task.result()
        if leaving.done():
            raise asyncio.CancelledError("client disconnected")
        raise deadline.error()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream_until(deadline: Deadline, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream of server-sent events; one that takes too long ends with an error event."""
    try:
        async with asyncio.timeout(deadline.remaining_s):
            async for event in events:
                yield event
    except TimeoutError:
        yield f"data: {json.dumps(deadline.error().body())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
