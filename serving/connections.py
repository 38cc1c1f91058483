"""Connections of the server in one process: a client that is slow on purpose loses its own.

Uvicorn reads a request's head without limit of size or time, and waits for ever for a client that
does not read. On Ray the connections are those of Serve's proxy, and a reverse proxy in front of
it has to do this (as it should in front of either).
"""

from __future__ import annotations

import asyncio
import json
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import BadRequestError, SieveError

logger = logging.getLogger("sieve")

MAX_HEAD_BYTES = 65_536


class HeadTooLargeError(SieveError):
    """More bytes of request line and headers than are read (431)."""

    status = 431
    code = "headers_too_large"


class TimedConnection(HttpToolsProtocol):
    """Uvicorn's connection, with limits on how long and how large a request's head may be.

    `client_timeout_s` is what a client has for a head, and for reading on once the buffers between
    us are full. The body's time is `serving.middleware.BodyLimit`'s, which both homes have.
    """

    client_timeout_s = 60.0
    _timer: asyncio.TimerHandle | None = None
    _writing_timer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time for the first head."""
        super().connection_made(transport)
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all clocks."""
        super().connection_lost(exc)
        self._end_head()
        self._end_writing()

    def data_received(self, data: bytes) -> None:
        """Passes bytes on, as long as a head does not grow too large."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLargeError(f"request line and headers are over {MAX_HEAD_BYTES} B"))
        elif self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._start_timer()  # the rest of a body that was refused, or nothing at all

    def on_message_begin(self) -> None:
        """A head starts."""
        super().on_message_begin()
        self._end_head()
        self._start_head()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._end_head()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write: from now on it has its time."""
        super().pause_writing()
        self._end_writing()
        self._writing_timer = self.loop.call_later(self.client_timeout_s, self._give_up, "answer")

    def resume_writing(self) -> None:
        """It read on."""
        super().resume_writing()
        self._end_writing()

    def on_response_complete(self) -> None:
        """An answer is written; what of it nobody reads does not stay."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._end_writing()
            self._writing_timer = self.loop.call_later(
                self.client_timeout_s, self._give_up, "answer"
            )

    def timeout_keep_alive_handler(self) -> None:
        """Ends an idle connection, at once where its last answer was not read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all."""
        self._refuse(BadRequestError(msg))

    def _start_head(self) -> None:
        self._head_bytes = 0
        self._start_timer()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.client_timeout_s, self._give_up, "request")

    def _end_head(self) -> None:
        self._head_bytes = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_writing(self) -> None:
        if self._writing_timer is not None:
            self._writing_timer.cancel()
            self._writing_timer = None

    def _give_up(self, what: str) -> None:
        logger.info("a connection was closed: its %s took too long", what)
        self.transport.abort()

    def _refuse(self, error: SieveError) -> None:
        if self.transport.is_closing():
            return
        self._end_head()
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def connection_class(client_timeout_s: float) -> type[TimedConnection]:
    """Connections with this much time for their clients."""
    return type(
        "ServedConnection", (TimedConnection,), {"client_timeout_s": float(client_timeout_s)}
    )
