"""The end of a server: what was accepted is answered, what comes is told to go elsewhere.

From the signal on `/readyz` is red, and every new request, on a connection that was kept alive as
well, gets 503 `draining` with `Connection: close`. The server goes on listening until the last
accepted request is answered or the limit has passed; those still there then are told the same, a
stream by its last event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from contextlib import suppress

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import DrainingError
from serving.pulse import Pulse

logger = logging.getLogger("sieve")

_ALWAYS_ANSWERED = ("/healthz", "/metrics")
_NOT_COUNTED = ("/readyz",)
_LAST_WORDS_S = 2.0
_LINGER_S = 1.0
"""It listens so long even if nobody is inside: those who are just connecting are told as well."""
_DISCARD_S = 5.0
_MOST_RETRY_AFTER_S = 5


class Drain:
    """Who is inside a server, and whether it still lets anybody in.

    Args:
        limit_s: how long those inside may stay once it ends.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._ends: float | None = None
        self._inside: set[asyncio.Task[object]] = set()
        self._left = Pulse()
        self.is_over = False

    @property
    def is_on(self) -> bool:
        """Whether nobody is let in any more."""
        return self._ends is not None

    @property
    def num_inside(self) -> int:
        """Accepted requests without their answer."""
        return len(self._inside)

    @property
    def remaining_s(self) -> float:
        """Seconds left to those inside."""
        return self._limit_s if self._ends is None else max(0.0, self._ends - time.monotonic())

    async def run(self) -> None:
        """Begins; returns once everybody left, or was told that the time is over."""
        self.begin()
        logger.warning(
            "draining: %d accepted requests have %g s", self.num_inside, self.remaining_s
        )
        await self._left.until(lambda: self.is_over, min(_LINGER_S, self._limit_s))
        if not await self._left.until(lambda: not self._inside, self.remaining_s):
            logger.warning("draining: %d requests were not answered in time", self.num_inside)
            self.cut()
            await self._left.until(lambda: not self._inside, _LAST_WORDS_S)

    def begin(self) -> None:
        """Lets nobody in from now on."""
        if self._ends is None:
            self._ends = time.monotonic() + self._limit_s

    def cut(self) -> None:
        """Ends the time of those inside now."""
        self.begin()
        self._ends, self.is_over = time.monotonic(), True
        for task in list(self._inside):
            task.cancel()
        self._left.beat()

    def enter(self) -> None:
        """The request of this task came in."""
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)

    def leave(self) -> None:
        """It was answered."""
        task = asyncio.current_task()
        assert task is not None
        self._inside.discard(task)
        if self.is_on:
            self._left.beat()

    def error(self) -> DrainingError:
        """What a client is told."""
        error = DrainingError(
            "this server is stopping; try again, with another server where there is one"
        )
        error.retry_after_s = max(1, min(_MOST_RETRY_AFTER_S, math.ceil(self.remaining_s)))
        return error


class DrainGate:
    """Pure ASGI before the app: counts who is inside, and refuses while the server drains.

    Args:
        app: what is served.
        drain: of this server.
    """

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
        elif self._drain.is_on:
            await _discard_body(receive)
            await self._refusal()(scope, receive, send)
        elif scope["path"] in _NOT_COUNTED:
            await self._app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send, self._drain)
        self._drain.enter()
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._drain.is_over or task is None or not task.cancelling():
                raise
            task.uncancel()
            await self._tell(answer, scope, receive)
        finally:
            self._drain.leave()

    async def _tell(self, answer: _Answer, scope: Scope, receive: Receive) -> None:
        if not answer.has_begun:
            await self._refusal()(scope, receive, answer.send)
        elif answer.is_stream and not answer.is_whole:
            error = json.dumps(self._drain.error().body())
            body = f"data: {error}\n\ndata: [DONE]\n\n".encode()
            await answer.send({"type": "http.response.body", "body": body, "more_body": False})

    def _refusal(self) -> JSONResponse:
        error = self._drain.error()
        headers = {"Retry-After": str(error.retry_after_s), "Connection": "close"}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _discard_body(receive: Receive) -> None:
    """Closed on a body that still comes in, a client hears of a broken connection and no more."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body", False):
                pass


class _Answer:
    """What was sent of an answer; the connection of one that begins in the drain ends with it."""

    def __init__(self, send: Send, drain: Drain) -> None:
        self._send, self._drain = send, drain
        self.has_begun = self.is_whole = self.is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            content = Headers(raw=message["headers"]).get("content-type", "")
            self.is_stream = content.startswith("text/event-stream")
            if self._drain.is_on:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
        await self._send(message)
