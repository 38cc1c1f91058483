"""The adapters of one engine: loaded before their first request, dropped after their last.

VLLM keeps `max_cpu_loras` of them and evicts the one not used for longest. It would also load by
itself, in the middle of a step, where a file that cannot be read ends the engine; so every adapter
is loaded here first, from a private copy that stays until no request needs it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from serving.adapter_files import PrivateCopies
from serving.errors import AdapterError
from serving.protocol import Adapter, LoraRoom
from serving.pulse import Pulse

logger = logging.getLogger(__name__)


class LoraSlots(Protocol):
    """What the engine does with adapters, each known by a number of this engine's."""

    async def load(self, adapter: Adapter, path: str, number: int) -> None:
        """Raises `AdapterError` where the engine refuses it."""

    async def unload(self, adapter: Adapter, number: int) -> None:
        """Frees its memory."""

    async def pin(self, number: int) -> None:
        """Never evicts it from now on."""

    async def resident(self) -> set[int]:
        """Numbers of those in memory."""


class LoadedAdapters:
    """Which adapters an engine has, and how many requests need each.

    Args:
        slots: the engine.
        room: what it has room for.
        on_load: called with the seconds a load took.
    """

    def __init__(
        self, slots: LoraSlots, room: LoraRoom | None, on_load: Callable[[float], None]
    ) -> None:
        self._slots, self._room, self._on_load = slots, room, on_load
        self._copies = PrivateCopies()
        self._numbers: dict[str, int] = {}
        self._adapters: dict[str, Adapter] = {}
        self._last_number = 0
        self._pinned: set[str] = set()
        self._in_use: Counter[str] = Counter()
        self._idle = Pulse()
        self._locks: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def in_use(self, adapter: Adapter | None) -> AsyncIterator[None]:
        """Holds an adapter loaded for one request.

        Raises:
            AdapterError: it cannot be loaded.
        """
        if adapter is None:
            yield
            return
        self._in_use[adapter.key] += 1
        try:
            if adapter.key not in self._numbers:
                await self.prepare(adapter)
            yield
        finally:
            self._in_use[adapter.key] -= 1
            if not self._in_use[adapter.key]:
                del self._in_use[adapter.key]
                self._idle.beat()

    async def prepare(self, adapter: Adapter) -> None:
        """Loads an adapter, once however many ask.

        Raises:
            AdapterError: there is no room for its kind, its files are gone or changed, or the
                engine refuses it; the engine goes on.
        """
        async with self._locks.setdefault(adapter.key, asyncio.Lock()):
            if adapter.key in self._numbers:
                return
            self._check_room(adapter)
            path = await asyncio.to_thread(self._copies.take, adapter)
            started = time.perf_counter()
            self._last_number += 1
            try:
                await self._slots.load(adapter, str(path), self._last_number)
            except AdapterError:
                self._copies.drop(adapter)
                raise
            self._numbers[adapter.key] = self._last_number
            self._adapters[adapter.key] = adapter
            self._on_load(time.perf_counter() - started)

    def _check_room(self, adapter: Adapter) -> None:
        if self._room is None:
            raise AdapterError("this engine was started without room for adapters; see --adapters")
        if adapter.rank > self._room.max_rank:
            raise AdapterError(
                f"adapter {adapter.name!r} has rank {adapter.rank}, this server has room for "
                f"{self._room.max_rank}; start it with --max-lora-rank {adapter.rank}"
            )
        if adapter.has_projector and not self._room.has_projector:
            raise AdapterError(
                f"adapter {adapter.name!r} has weights for the projector, which this server would "
                "ignore; start it with --projector-lora"
            )

    async def pin(self, keys: Iterable[str]) -> None:
        """Pins those of the adapters that are loaded."""
        for key in set(keys) - self._pinned:
            if key in self._numbers:
                await self._slots.pin(self._numbers[key])
                self._pinned.add(key)

    async def release(self, wanted: set[str]) -> None:
        """Unloads all but the wanted ones, each after its last request."""
        for key in set(self._numbers) - wanted:
            await self._idle.until(lambda key=key: key not in self._in_use, math.inf)  # type: ignore[misc]
            if key in self._numbers:
                await self._slots.unload(self._adapters[key], self._numbers[key])
                self._forget(key)

    async def resident(self) -> frozenset[str]:
        """Keys of the adapters in memory; those that vLLM evicted are forgotten."""
        if self._room is None:  # asking an engine without room is an error in its worker
            return frozenset()
        before = dict(self._numbers)
        numbers = await self._slots.resident()
        for key, number in before.items():
            is_same = self._numbers.get(key) == number
            if number not in numbers and is_same and key not in self._in_use:
                self._forget(key)
        return frozenset(self._numbers)

    def _forget(self, key: str) -> None:
        del self._numbers[key]
        self._pinned.discard(key)
        self._locks.pop(key, None)
        self._copies.drop(self._adapters.pop(key))

    def number(self, adapter: Adapter) -> int:
        """The engine's own number of a loaded adapter."""
        return self._numbers[adapter.key]

    def path(self, adapter: Adapter) -> str:
        """Where its private copy is."""
        return str(self._copies.path(adapter))

    def close(self) -> None:
        """Removes the private copies."""
        self._copies.close()
