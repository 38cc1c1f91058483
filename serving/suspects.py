"""Requests that were in an engine when it failed by itself, or hung: one may be the cause.

It is not sent on; at two such failures, or where it was there alone, it is refused from then on.
Those suspected once are tried one at a time, so that of a company only the guilty one is there at
a second failure; an answer clears the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from serving.errors import BadRequestError, EngineDeadError, SieveError
from serving.protocol import ChatCall, Generation


class Suspects:
    """Requests that were in an engine when it failed by itself, known by what they ask.

    Args:
        most: how many are remembered.
        strikes_alone: of a request that was the only one there; two refuse it. One where an engine
            in this process cannot tell a killed worker from one that failed.
    """

    def __init__(self, most: int = 1000, *, strikes_alone: int = 2) -> None:
        self._most, self._strikes_alone = most, strikes_alone
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._last: dict[str, str] = {}
        self._turn = asyncio.Lock()

    def check(self, request: Generation | ChatCall) -> None:
        """Refuses a request that is known to stop engines.

        Raises:
            BadRequestError: it is.
        """
        if self._failures and self._failures.get(fingerprint(request), 0) >= 2:
            raise _quarantined()

    @asynccontextmanager
    async def turn(self, request: Generation | ChatCall) -> AsyncIterator[None]:
        """The time of a request with the engines: a suspect waits for the others, and is cleared.

        Raises:
            BadRequestError: it is known to stop engines.
        """
        mark = fingerprint(request) if self._failures else ""
        if mark not in self._failures:
            yield
            return
        async with self._turn:
            self.check(request)
            yield
            is_answered = not (isinstance(request, ChatCall) and request.body.get("stream"))
            if is_answered:  # a stream has only begun
                self._failures.pop(mark, None)
                self._last.pop(mark, None)

    def add(self, request: Generation | ChatCall, error: EngineDeadError) -> SieveError:
        """Notes a failure; returns what the client is told.

        The same question, asked several times at once, is struck once by one failure.
        """
        mark = fingerprint(request)
        strikes = self._strikes_alone if error.num_together <= 1 else 1
        if error.engine and self._last.get(mark) == error.engine:
            strikes = 0
        self._last[mark] = error.engine
        self._failures[mark] = self._failures.pop(mark, 0) + strikes
        while len(self._failures) > self._most:
            self._last.pop(self._failures.popitem(last=False)[0], None)
        if self._failures[mark] >= 2:
            return _quarantined()
        told = EngineDeadError(
            "the engine failed while it worked on this request and others; try again shortly",
            code="engine_crashed",
        )
        told.retry_after_s = 5
        return told


def fingerprint(request: Generation | ChatCall) -> str:
    """Equal for requests that ask the same of an engine, whosever key they came with."""
    asked = replace(request, request_id="", cache_salt=None)
    return hashlib.sha256(pickle.dumps(asked)).hexdigest()


def _quarantined() -> BadRequestError:
    return BadRequestError(
        "an engine failed while it worked on this request, so it is not tried again; change its "
        "image, text or parameters",
        code="quarantined",
    )
