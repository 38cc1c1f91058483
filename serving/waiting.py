"""How long a request is worked on: while its client waits, until its deadline, if there is room."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from prometheus_client import Gauge

from serving.errors import ClientLeftError, DeadlineError, OverloadedError
from serving.pace import Pace, retry_after

T = TypeVar("T")


class Turnstile:
    """Bounds the requests of an HTTP side that are taken and not yet answered, by number and time.

    Args:
        most: how many.
        pending: shows how many there are.
        at_once: as many are served side by side; what they do more slowly says nothing of a queue.
        patience_s: who would wait longer than this is not let in; no bound by default.
    """

    def __init__(
        self, most: int, pending: Gauge, *, at_once: int = 1, patience_s: float = math.inf
    ) -> None:
        self._most, self._pending = most, pending
        self._at_once, self._patience_s = at_once, patience_s
        self._inside, self._pace = 0, Pace()

    def check(self, deadline_s: float = math.inf) -> None:
        """Refuses who would not be served.

        Args:
            deadline_s: what the request itself allows.

        Raises:
            OverloadedError: it is full (429), or the wait would be too long (503); `Retry-After` is
                when half of those inside will have left.
        """
        wait_s = self._pace.seconds_for(self._inside + 1)
        if self._inside >= self._most:
            error = OverloadedError(
                f"{self._inside} requests are pending, allowed are {self._most}; try again in "
                "the seconds that Retry-After says"
            )
            error.status = 429
        elif self._inside > self._at_once and (wait_s or 0) > min(self._patience_s, deadline_s):
            error = OverloadedError(
                f"{self._inside} requests are pending, a new one would wait {wait_s:.0f} s; try "
                "again in the seconds that Retry-After says"
            )
        else:
            return
        error.retry_after_s = retry_after((wait_s or 0) / 2)
        raise error

    @contextmanager
    def passage(self, deadline_s: float = math.inf) -> Iterator[None]:
        """One request's time inside.

        Raises:
            OverloadedError: see `check`.
        """
        self.check(deadline_s)
        with self.stay():
            yield

    @contextmanager
    def stay(self) -> Iterator[None]:
        """The time inside of one that was let in already."""
        self._move(1)
        try:
            yield
        finally:
            self._move(-1)

    def _move(self, step: int) -> None:
        self._pace.tick(was_busy=self._inside > self._at_once, done=max(0, -step))
        self._inside += step
        self._pending.set(self._inside)


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
        ClientLeftError: the client left; nobody waits for an answer.
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
            raise ClientLeftError("the client left")
        raise deadline.error()
    finally:
        leaving.cancel()
        if not task.done():
            task.add_done_callback(_told)  # what it says when it is cancelled is for nobody
            task.cancel()


def _told(task: asyncio.Future[Any]) -> None:
    """Takes note of an exception, which asyncio would log otherwise."""
    if not task.cancelled():
        task.exception()


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
