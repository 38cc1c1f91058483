"""Clients that no HTTP library would be: raw paths, raw sockets, both homes as one interface."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process_tree import descendants

LEAKS = re.compile(
    r"Traceback|site-packages|/(?:root|tmp|home|usr|opt|var|dev|proc)/|, line \d|object at 0x"
    r"|sieve-[\w-]{16}|ray::|\bpid\b"
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole answer; `error` is that of its body, where it has one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return None


def send(url, method, path, body=b"", headers=None, timeout=120) -> Reply:
    """Sends a request as it is spelled; one that is answered before it was sent is fine."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body or None, headers or {})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(status=answer.status, headers=found, body=answer.read())
    finally:
        connection.close()


class Raw:
    """A connection on which bytes are sent as they are."""

    def __init__(self, url: str, receive_buffer: int | None = None) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(60)
        self._socket.connect((host, int(port)))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Whether it could be sent."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def some(self, size: int = 65_536) -> bytes:
        """What comes next; nothing where the connection is closed."""
        try:
            return self._socket.recv(size)
        except ConnectionResetError:
            return b""

    def rest(self) -> bytes:
        """All until the connection is closed."""
        found = b""
        while more := self.some():
            found += more
        return found


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def engine_cores(pid: int) -> list[int]:
    """Engine processes below a server, whichever home it is."""
    found = []
    for each in descendants(pid):
        try:
            title = Path(f"/proc/{each}/cmdline").read_text()
        except OSError:
            continue
        if "EngineCore" in title or "VLLM::" in title:
            found.append(each)
    return sorted(found)
