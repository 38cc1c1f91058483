"""How fast work gets done while there is work: `Retry-After` and early refusals come from that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_MEMORY_S = 20.0
_ENOUGH_S = 1.0
MOST_RETRY_AFTER_S = 300


class Pace:
    """Units done a second, of busy time alone: an idle minute does not make a server slow.

    What is older than some twenty busy seconds hardly counts.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._done = self._busy_s = 0.0

    def tick(self, *, was_busy: bool, done: float = 0.0) -> None:
        """Notes the time since the last tick.

        Args:
            was_busy: there was work to do all that time.
            done: units of work that ended with it; they count only where it was busy.
        """
        now = self._clock()
        passed_s, self._last = now - self._last, now
        if was_busy:
            kept = math.exp(-passed_s / _MEMORY_S)
            self._done = kept * self._done + done
            self._busy_s = kept * self._busy_s + passed_s

    @property
    def per_s(self) -> float | None:
        """Units a second; None where that is not known yet."""
        return self._done / self._busy_s if self._busy_s >= _ENOUGH_S and self._done > 0 else None

    def seconds_for(self, units: float) -> float | None:
        """How long so many units take; None where that is not known yet."""
        per_s = self.per_s
        return None if per_s is None else units / per_s


def retry_after(seconds: float) -> int:
    """Whole seconds for a `Retry-After`, at least 1."""
    return max(1, min(MOST_RETRY_AFTER_S, math.ceil(seconds)))
