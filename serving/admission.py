"""What is refused before a body is read: requests and bytes beyond what is held at once."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.error_handlers import respond
from serving.errors import OverloadedError, SieveError
from serving.metrics import Metrics
from serving.pace import Pace, retry_after
from serving.waiting import Turnstile

ANSWERING_PATHS = ("/v1/label", "/v1/chat/completions")


class BodyRoom:
    """Bytes of bodies that the server holds at once.

    A body stays in memory, as bytes, as text and as images, until its request is answered: without
    a bound on their sum a few hundred clients with large images would take all there is.

    Args:
        most: how many bytes.
        shown: shows how many there are.
    """

    def __init__(self, most: int, shown: Gauge) -> None:
        self._most, self._shown, self._held = most, shown, 0
        self._pace = Pace()

    def check(self, size: int) -> None:
        """Refuses a body that does not fit now; an empty room takes any.

        Raises:
            OverloadedError: there is no room (503).
        """
        if self._held and self._held + size > self._most:
            error = OverloadedError(
                f"bodies of {self._held} bytes are being worked on, allowed are {self._most}; try "
                "again in the seconds that Retry-After says"
            )
            error.retry_after_s = retry_after(self._pace.seconds_for(size) or 1)
            raise error

    def take(self, size: int) -> None:
        """Holds so many bytes more.

        Raises:
            OverloadedError: there is no room (503).
        """
        self.check(size)
        self._move(size)

    def give_back(self, size: int) -> None:
        """Lets go of them."""
        self._move(-size)

    def _move(self, step: int) -> None:
        self._pace.tick(was_busy=self._held > 0, done=max(0, -step))
        self._held += step
        self._shown.set(self._held)


class Admission:
    """Pure ASGI before the app: refuses a request for an answer by its head, or while it comes in.

    Args:
        app: what is served.
        turnstile: knows how many are pending.
        room: for bodies.
        metrics: counts refusals.
        check_up: raises where it is known that no engine would answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        turnstile: Turnstile,
        room: BodyRoom,
        metrics: Metrics,
        check_up: Callable[[], None] | None = None,
    ) -> None:
        self._app, self._turnstile, self._room = app, turnstile, room
        self._metrics, self._check_up = metrics, check_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http" or scope["path"] not in ANSWERING_PATHS:
            await self._app(scope, receive, send)
            return
        declared, held = dict(scope["headers"]).get(b"content-length", b""), 0
        try:
            if self._check_up is not None:
                self._check_up()
            self._turnstile.check()
            if declared.isdigit() and len(declared) <= 18:
                self._room.check(int(declared))
        except SieveError as error:
            # The connection stays: closed on a body that still comes in, its client would hear of
            # a broken connection and not of this. Uvicorn throws the rest of the body away.
            await respond(error, scope, self._metrics)(scope, receive, send)
            return

        async def received() -> Message:
            """What comes is held, what is only declared is not: saying so costs nothing."""
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            self._room.take(size)
            held += size
            return message

        try:
            await self._app(scope, received, send)
        finally:
            self._room.give_back(held)
