"""Waking all who wait for something to change, without a lock to hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress


class Pulse:
    """Something changes now and then; whoever waits looks again each time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def beat(self) -> None:
        """Wakes all who wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(
        self, is_true: Callable[[], bool], timeout_s: float, *, look_every_s: float = 0.5
    ) -> bool:
        """Waits until something holds.

        Returns:
            Whether it does; not, where the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not is_true():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # Not `wait_for`: Python 3.11's loses a cancellation that comes with the beat.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, look_every_s)):
                    await self._event.wait()
        return True
