"""Followers of the adapter registry: an engine loads what it says, an HTTP side serves it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Protocol

from serving.adapter_states import AdapterStatus, Follow, Report, Snapshot
from serving.catalogue import Catalogue
from serving.errors import SieveError
from serving.protocol import Adapter

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


class AdapterHolder(Protocol):
    """What of an engine loads adapters (`serving.loaded_adapters`)."""

    async def prepare(self, adapter: Adapter) -> None:
        """Loads one."""

    async def pin(self, keys: frozenset[str]) -> None:
        """Pins those loaded."""

    async def release(self, wanted: set[str]) -> None:
        """Unloads the others."""

    async def resident(self) -> frozenset[str]:
        """Keys in memory."""


class Bulletin:
    """What an HTTP side knows of the registry: its catalogue and the states for people."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.statuses: tuple[AdapterStatus, ...] = ()

    def update(self, snapshot: Snapshot) -> None:
        """Serves what the snapshot says."""
        self.catalogue.update(snapshot.served)
        self.statuses = snapshot.statuses


async def follow_with_bulletin(follow: Follow, bulletin: Bulletin) -> None:
    """Keeps an HTTP side up to date, for ever; without the registry it serves what it knows."""
    member, seen = f"http-{uuid.uuid4().hex[:8]}", -1
    while True:
        try:
            snapshot = await follow(Report(member=member, kind="http", seen=seen))
        except Exception as error:  # the registry restarts; whatever Ray says about it
            logger.debug("registry out of reach: %r", error)
            await asyncio.sleep(_RETRY_S)
            continue
        bulletin.update(snapshot)
        seen = snapshot.number


async def follow_with_engine(follow: Follow, holder: AdapterHolder) -> None:
    """Has an engine load, pin and drop adapters as the registry says, for ever."""
    member, seen = f"engine-{uuid.uuid4().hex[:8]}", -1
    prepared: dict[str, str | None] = {}
    releasing: asyncio.Task[None] | None = None
    while True:
        try:
            held = await holder.resident()
            report = Report(
                member=member, kind="engine", seen=seen, prepared=dict(prepared), held=held
            )
            snapshot = await follow(report)
        except Exception as error:  # the registry restarts, or the engine is ending
            logger.debug("registry out of reach: %r", error)
            await asyncio.sleep(_RETRY_S)
            continue
        prepared = await _prepare(holder, snapshot, prepared)
        await _pin(holder, snapshot)
        if releasing is None or releasing.done():
            releasing = asyncio.create_task(holder.release(wanted(snapshot)))
        seen = snapshot.number


def wanted(snapshot: Snapshot) -> set[str]:
    """Keys that an engine may hold."""
    served = {installed.adapter.key for installed in snapshot.served.values()}
    return served | {adapter.key for adapter in snapshot.preparing} | snapshot.draining


async def _prepare(
    holder: AdapterHolder, snapshot: Snapshot, known: dict[str, str | None]
) -> dict[str, str | None]:
    """Answers for what is being prepared, and for nothing else."""
    answers: dict[str, str | None] = {}
    for adapter in snapshot.preparing:
        if adapter.key not in known:
            try:
                await holder.prepare(adapter)
                answers[adapter.key] = None
            except SieveError as error:
                answers[adapter.key] = error.message
        else:
            answers[adapter.key] = known[adapter.key]
    return answers


async def _pin(holder: AdapterHolder, snapshot: Snapshot) -> None:
    pinned = [i.adapter for i in snapshot.served.values() if i.adapter.key in snapshot.pinned]
    for adapter in pinned:
        try:
            await holder.prepare(adapter)
        except SieveError as error:
            logger.warning("pinned adapter %r cannot be loaded: %s", adapter.name, error.message)
    await holder.pin(snapshot.pinned)
