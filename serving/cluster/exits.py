"""The end of the application: every HTTP side drains, and tells when it has."""

from __future__ import annotations

import time

from serving.pulse import Pulse

POLL_S = 3.0
_FORGOTTEN_S = 3 * POLL_S
_LAST_WORDS_S = 5.0


class Exits:
    """Which HTTP sides there are, and which of them are empty."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._done: set[str] = set()
        self._is_on = False
        self._news = Pulse()

    async def begun(self, ingress: str) -> bool:
        """Whether the end has begun; waits for it a few seconds."""
        self._asked[ingress] = time.monotonic()
        return await self._news.until(lambda: self._is_on, POLL_S)

    def done(self, ingress: str) -> None:
        """An HTTP side is empty."""
        self._done.add(ingress)
        self._news.beat()

    async def all_done(self, limit_s: float) -> bool:
        """Begins the end; whether every HTTP side was empty in time."""
        oldest = time.monotonic() - _FORGOTTEN_S
        living = {name for name, asked in self._asked.items() if asked > oldest}
        self._is_on = True
        self._news.beat()
        return await self._news.until(lambda: living <= self._done, limit_s + _LAST_WORDS_S)
