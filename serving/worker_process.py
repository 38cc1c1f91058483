"""What worker processes of this project have in common: how they start and when they end."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext


def fork_server(preload: Sequence[str]) -> ForkServerContext:
    """Where workers are forked from, a process that has imported `preload` and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def end_with_parent() -> None:
    """Ends this worker with the process it works for, which may be killed.

    The sentinel is a pipe that the parent holds: it closes at once, also where nobody reaps the
    killed process.
    """
    threading.Thread(target=_end_without_parent, daemon=True).start()


def _end_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)
