"""Processes of an engine: its cores and whatever they started, ended for sure (Linux, /proc).

A worker that is stopped, or whose core is gone, hears no signal but SIGKILL. And an engine that is
killed leaves its shared memory behind; every restart would cost some.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

logger = logging.getLogger("sieve.engine")

_ENDED_BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM)
_GONE_S = 10.0
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class LiveProcess:
    """A process that was seen; `started` tells it from a later one with the same number.

    Attributes:
        pid: its number.
        started: clock ticks from the machine's start to its own.
    """

    pid: int
    started: int

    @property
    def is_there(self) -> bool:
        """Whether it runs; one that only waits to be reaped does not."""
        return seen(self.pid) == self


def seen(pid: int) -> LiveProcess | None:
    """The process of that number, if it runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rsplit(")", 1)[1].split()  # after the name: state is 3rd, start is 22nd
    return LiveProcess(pid, int(fields[19])) if fields[0] not in ("Z", "X") else None


def descendants(pid: int) -> list[int]:
    """Numbers of the processes that a process started, and theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


class ProcessFamily:
    """Engine cores with all that they started.

    Args:
        cores: processes that this one started.
    """

    def __init__(self, cores: Sequence[BaseProcess]) -> None:
        self._cores = list(cores)
        self._known: set[LiveProcess] = set()
        self._segments: set[Path] = set()
        self._has_tracker = False
        self.look()

    def look(self) -> None:
        """Notes who belongs to it now: of a core that is gone nobody knows the children."""
        pids = [core.pid for core in self._cores if core.pid is not None]
        pids += [child for pid in pids for child in descendants(pid)]
        self._has_tracker |= any(map(_tracks, pids))
        found = {process for pid in pids if (process := seen(pid)) and not _tracks(pid)}
        self._known |= found
        ours = _shared_memory(os.getpid())
        for process in found:
            self._segments |= _shared_memory(process.pid) - ours

    @property
    def pids(self) -> list[int]:
        """Those that run."""
        return sorted(process.pid for process in self._known if process.is_there)

    def was_ended_from_outside(self, wait_s: float) -> bool:
        """Whether a signal that no fault raises ended a core; waits so long for it to end."""
        for core in self._cores:
            core.join(timeout=wait_s)
        return any(core.exitcode in _ENDED_BY_OTHERS for core in self._cores)

    def kill(self) -> None:
        """SIGKILL for all of them; returns when they are gone and their shared memory with them."""
        self.look()
        deadline = time.monotonic() + _GONE_S
        for process in self._known:
            if process.is_there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for core in self._cores:
            core.join(timeout=max(0.0, deadline - time.monotonic()))
        while self.pids and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.pids:
            logger.error("engine processes %s do not end even after SIGKILL", self.pids)
        for segment in self._segments:
            self._remove(segment)

    def _remove(self, segment: Path) -> None:
        try:
            segment.unlink()
        except FileNotFoundError:
            return
        if not self._has_tracker:  # then ours holds it for a leak that it is to clean up
            resource_tracker.unregister(f"/{segment.name}", "shared_memory")


def _tracks(pid: int) -> bool:
    """Whether it is Python's resource tracker, which cleans up and ends once the others did."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _shared_memory(pid: int) -> set[Path]:
    """Named segments that a process maps."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/dev/shm/" in line}
    return {path for path in paths if path.parent == _SHARED_MEMORY and path.is_file()}
