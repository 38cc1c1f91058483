"""Pure ASGI around the app: Starlette's `BaseHTTPMiddleware` would hide the client's disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from contextvars import ContextVar

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import SieveError, SlowRequestError, TooLargeError
from serving.keys import caller

logger = logging.getLogger("sieve.access")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being served: the client's `X-Request-Id`, or one of ours."""

_CLIENTS_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """Gives every request an id, answers with it, and logs a line with it at the end.

    Args:
        app: what is served.
        are_answered: whether answers carry the id already; Ray Serve's proxy does that.
    """

    def __init__(self, app: ASGIApp, *, are_answered: bool = False) -> None:
        self._app, self._are_answered = app, are_answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"x-request-id", b"")
        own = asked.decode() if _CLIENTS_ID.fullmatch(asked) else uuid.uuid4().hex
        request_id.set(own)
        caller.set(None)
        started, status = time.perf_counter(), 499  # the client left

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self._are_answered:
                    MutableHeaders(scope=message)["X-Request-Id"] = own
            await send(message)

        try:
            await self._app(scope, receive, marked)
        finally:
            if logger.isEnabledFor(logging.INFO):
                line = {
                    "request_id": own,
                    "method": scope["method"],
                    "path": scope["path"][:80],
                    "status": status,
                    **({"key": key.name} if (key := caller.get()) else {}),
                    "ms": round(1e3 * (time.perf_counter() - started), 1),
                }
                logger.info(json.dumps(line), extra={"fields": line})


class BodyLimit:
    """Refuses bodies over a limit, by header at once, by count while they come in, and slow ones.

    Args:
        app: what is served.
        max_bytes: of a body.
        timeout_s: that a whole body may take.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float = 60.0) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_bytes):
            await _refusal(self._too_large())(scope, receive, send)
            return
        ends = asyncio.get_running_loop().time() + self._timeout_s
        received, is_whole, is_refused = 0, False, False
        failure: SieveError | None = None

        async def counted() -> Message:
            nonlocal received, is_whole, failure
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                failure = SlowRequestError(
                    f"the body was not here within {self._timeout_s:g} s; send fewer or smaller "
                    "images"
                )
                raise failure from None
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                failure = self._too_large()
                raise failure
            is_whole = not message.get("more_body", False)
            return message

        async def refusing(message: Message) -> None:
            """FastAPI calls a failed body a 400 of its own; the client gets ours instead."""
            nonlocal is_refused
            if failure is None:
                await send(message)
            elif not is_refused:
                is_refused = True
                await _refusal(failure)(scope, receive, send)

        await self._app(scope, counted, refusing)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the body is larger than {self._max_bytes} bytes; send fewer or smaller images"
        )


def _refusal(error: SieveError) -> JSONResponse:
    """Ends the connection too: the rest of the body is not worth reading."""
    return JSONResponse(error.body(), status_code=error.status, headers={"Connection": "close"})
