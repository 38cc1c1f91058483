"""Processes of this machine, as /proc tells them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bench.outcome import BenchError


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


def engine_core(replica: int) -> int:
    """The engine core of a replica.

    Raises:
        BenchError: it has none.
    """
    for pid in descendants(replica):
        if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise BenchError(f"process {replica} has no engine core")
