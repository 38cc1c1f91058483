"""A child process that is asked a line and answers a line: both ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from bench.outcome import BenchError

STOP_TIMEOUT_S = 60.0
_READY = "ready"


class LineProcess:
    """The parent's end; the child is up once this is made, and ends with the block.

    Args:
        arguments: of Python; the child uses `replies`.
        log: file for what the child prints besides its replies.
        environment: variables beside ours.

    Raises:
        BenchError: it did not start; quotes the end of its log.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C comes to us alone; we stop it and its children
            )
        try:
            self._hear()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> LineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def ask(self, line: str) -> str:
        """The answer to a line.

        Raises:
            BenchError: the child ended; quotes the end of its log.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_hear` says what is wrong
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self._hear()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)  # it closes its stdout before it says why
            lines = self._log.read_text(errors="replace").splitlines()
            causes = [
                line for line in lines[:-15] if re.search(r"[A-Za-z](Error|Exception): ", line)
            ]
            told = "\n".join([*causes[:3], *lines[-15:]])
            raise BenchError(f"{self._log.stem} ended before it answered:\n{told}")
        return line

    def stop(self) -> None:
        """Closes its stdin, at which it ends; what is left of its process group is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def replies() -> Iterator[TextIO]:
    """The child's end: where replies go. All else that is printed to stdout goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as stream:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield stream


def reply(stream: TextIO, line: str = _READY) -> None:
    """Answers a line; the first one says that the child is up."""
    print(line, file=stream, flush=True)
