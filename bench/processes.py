"""Servers under test: started with a log file, waited for, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.outcome import BenchError, progress

READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 40.0
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Server:
    """A command that serves HTTP.

    Attributes:
        name: of the variant.
        arguments: of Python, with `--port` among them.
        port: where it listens.
        ready_path: answers 200 once the engine does.
        environment: variables beside ours.
    """

    name: str
    arguments: Sequence[str]
    port: int
    ready_path: str
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(servers: Sequence[Server], logs: Path) -> Iterator[list[int]]:
    """Starts all servers, waits until every one is ready, and stops them with the block.

    Yields:
        Their process ids.

    Raises:
        BenchError: one ended or was not ready in time; names its log.
    """
    with contextlib.ExitStack() as stack:
        stop_on_termination(stack)
        processes = [stack.enter_context(_process(server, logs)) for server in servers]
        for server, process in zip(servers, processes, strict=True):
            _wait_ready(server, process, logs)
        yield [process.pid for process in processes]


def stop_on_termination(stack: contextlib.ExitStack) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that servers are stopped."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    stack.callback(signal.signal, signal.SIGTERM, previous)


@contextlib.contextmanager
def _process(server: Server, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (logs / f"{server.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *server.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **server.environment},
            start_new_session=True,  # Ctrl-C comes to us alone; we stop it and its children
        )
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server; what is left of its own process group after that is killed."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_ready(server: Server, process: subprocess.Popen[bytes], logs: Path) -> None:
    progress(f"waiting for {server.name} (log {logs / server.name}.log) ...")
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(
                f"{server.name} ended with status {process.returncode} before it was ready:\n"
                + _tail(logs / f"{server.name}.log")
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}{server.ready_path}", timeout=5).status_code == 200:
                return
        time.sleep(_POLL_S)
    raise BenchError(
        f"{server.name} was not ready in {READY_TIMEOUT_S:.0f} s:\n"
        + _tail(logs / f"{server.name}.log")
    )


def _tail(path: Path, num_lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
