"""Processes of this machine, as /proc tells them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.outcome import BenchError

_PAGE = os.sysconf("SC_PAGE_SIZE")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


@contextlib.contextmanager
def paused(pids: Sequence[int]) -> Iterator[None]:
    """Processes and what they started stand still within the block, whatever happens in it."""
    everybody = [each for pid in pids for each in (pid, *descendants(pid))]
    try:
        _signal(everybody, signal.SIGSTOP)
        yield
    finally:
        _signal(everybody, signal.SIGCONT)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What processes hold at one moment.

    Attributes:
        rss: resident bytes; what they share counts for each of them.
        descriptors: open files, sockets and pipes.
        threads: of all of them.
        processes: how many there are.
        rss_each: resident bytes of each, by its id.
    """

    rss: int
    descriptors: int
    threads: int
    processes: int
    rss_each: Mapping[int, int] = field(default_factory=dict)


def usage(pid: int) -> Usage:
    """What a process and its descendants hold."""
    tried = {each: _usage_of(each) for each in [pid, *descendants(pid)]}
    found = {each: values for each, values in tried.items() if values is not None}
    return Usage(
        rss=sum(rss for rss, _, _ in found.values()),
        descriptors=sum(descriptors for _, descriptors, _ in found.values()),
        threads=sum(threads for _, _, threads in found.values()),
        processes=len(found),
        rss_each={each: rss for each, (rss, _, _) in found.items()},
    )


def _usage_of(pid: int) -> tuple[int, int, int] | None:
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        descriptors = len(list((folder / "fd").iterdir()))
        return pages * _PAGE, descriptors, len(list((folder / "task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None  # it ended meanwhile


def engine_core(replica: int) -> int:
    """The engine core of a replica.

    Raises:
        BenchError: it has none.
    """
    for pid in descendants(replica):
        if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise BenchError(f"process {replica} has no engine core")


def worker_of(core: int) -> int:
    """The worker of an engine core.

    Raises:
        BenchError: it has none.
    """
    for pid in descendants(core):
        if "Worker" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise BenchError(f"engine core {core} has no worker")
