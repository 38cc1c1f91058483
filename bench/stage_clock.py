"""Where a process notes how long its calls took: a file of fixed rows that outlives the process.

Only the standard library: this is imported before anything else in every process of a server. Rows
lie in a shared mapping, so that noting one is a few hundred nanoseconds without a system call, and
nothing is lost when a process is killed. `time.perf_counter` is the machine's monotonic clock on
Linux, so the rows of all processes have one time.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROW = struct.Struct("<IIdd")
"""Point (counted from 1, so that an empty row is none), thread, start and end in seconds."""
MAX_ROWS = 2_000_000
"""Of one process; the file is sparse."""


class StageClock:
    """The file of this process, and after a fork one of the child's own.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open()
        os.register_at_fork(after_in_child=self._open)

    def _open(self) -> None:
        file = os.open(self._folder / f"{os.getpid()}.spans", os.O_CREAT | os.O_RDWR, 0o600)
        os.ftruncate(file, ROW.size * MAX_ROWS)
        self._rows = mmap.mmap(file, ROW.size * MAX_ROWS)
        os.close(file)
        self._numbers = itertools.count()

    def note(self, point: int, start: float, end: float) -> None:
        """One call; a full file stays as it is, and whoever reads it sees that it is full."""
        number = next(self._numbers)
        if number < MAX_ROWS:
            thread = threading.get_native_id()
            ROW.pack_into(self._rows, number * ROW.size, point, thread, start, end)

    def timed(self, function: Callable[..., Any], point: int) -> Callable[..., Any]:
        """The same function, every call of it noted."""
        now, note = time.perf_counter, self.note

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                note(point, start, now())

        return call
