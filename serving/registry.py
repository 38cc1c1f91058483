"""The life of adapters: discovered, verified, loaded, draining, unloaded; or refused, with why.

One `Registry` a server, in its process or in Ray's coordinator. Those who need to know, engines and
HTTP sides, follow it: each call of `follow` reports what the follower did and waits for news. So
all agree on which version answers to a name, one that starts later included. A request carries its
version with it; nothing breaks where a follower is a moment behind.

A new version takes over in four steps: every engine loads it; the name points to it; every HTTP
side has said that it knows; engines drop the old one once its last request is answered.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from serving.adapter_choices import Choice, keep_choice, read_choices
from serving.adapter_files import AdapterFolder, AdapterSource, copy_adapter, digest_of
from serving.adapter_states import AdapterStatus, Report, Snapshot, State
from serving.adapters import InstalledAdapter
from serving.errors import AdapterError, UnknownModelError
from serving.protocol import Adapter
from serving.pulse import Pulse

logger = logging.getLogger(__name__)

POLL_S = 3.0
MEMBER_TTL_S = 3 * POLL_S
_PREPARE_TIMEOUT_S = 120.0
_MOST_UNLOADED = 100

Check = Callable[[Path, str, Mapping[str, InstalledAdapter]], InstalledAdapter]
"""Folder, name and what else is served, to a checked adapter; raises `AdapterError`."""


@dataclass
class _Member:
    report: Report
    last_s: float
    num_open: int = 0


@dataclass
class _Entry:
    source: AdapterSource
    state: State = State.DISCOVERED
    reason: str | None = None
    installed: InstalledAdapter | None = None
    is_pinned: bool = False

    @property
    def adapter(self) -> Adapter:
        assert self.installed is not None
        return self.installed.adapter


class Registry:
    """Adapters of a server.

    Args:
        folder: where they lie, or None where the server has none.
        check: everything that can be known before an engine sees an adapter.
        max_pinned: adapters that may be pinned; one slot of a batch stays free for the others.
    """

    def __init__(self, folder: AdapterFolder | None, check: Check, *, max_pinned: int = 0) -> None:
        self._folder, self._check, self.max_pinned = folder, check, max_pinned
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._current: dict[str, _Entry] = {}
        self._preparing: dict[str, Adapter] = {}
        self._members: dict[str, _Member] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._number = time.time_ns() // 1_000_000  # rises over restarts of the registry as well
        self._news = Pulse()
        self._tasks: set[asyncio.Task[None]] = set()

    async def discover(self) -> list[AdapterStatus]:
        """Looks at the whole folder once, at start: the newest good version of each name serves.

        A bad adapter is refused, which `statuses` tells, and the others are served.
        """
        if self._folder is None:
            return []
        kept = read_choices(self._folder)
        by_name: dict[str, list[AdapterSource]] = {}
        for source in await asyncio.to_thread(self._folder.list):
            self._entries[source.name, source.version] = _Entry(source=source)
            by_name.setdefault(source.name, []).append(source)
        for name, sources in by_name.items():
            choice = kept.get(name, Choice())
            if not choice.is_removed:
                await self._serve_newest(sources, choice)
        self._announce()
        return self.statuses()

    async def _serve_newest(self, sources: list[AdapterSource], choice: Choice) -> None:
        asked = [source for source in sources if source.version == choice.version]
        for source in asked or reversed(sources):
            entry = self._entries[source.name, source.version]
            try:
                await self._verify(entry)
            except AdapterError as error:
                logger.warning("adapter refused: %s", error.message)
                continue
            entry.is_pinned = choice.is_pinned
            self._current[source.name] = entry
            return

    async def add(
        self, name: str, version: str | None = None, *, pin: bool | None = None
    ) -> AdapterStatus:
        """Serves an adapter of the folder; the newest version unless one is named.

        Raises:
            UnknownModelError: the folder has no such adapter.
            AdapterError: it cannot be served; an older version of it goes on being served.
        """
        async with self._locks.setdefault(name, asyncio.Lock()):
            entry = await self._find(name, version)
            self._check_pins(entry, pin)
            await self._verify(entry)
            old = self._current.get(name)
            if old is None or old.adapter.key != entry.adapter.key:
                await self._prepare(entry)
            entry.is_pinned = entry.is_pinned if pin is None else pin
            self._current[name] = entry
            entry.state, entry.reason = (
                State.LOADED if self._holders(entry) else State.VERIFIED,
                None,
            )
            self._retire(old if old is not entry else None)
            self._announce()
            await self._known_to_all()
            self._keep(name, Choice(version=entry.source.version, is_pinned=entry.is_pinned))
            return self._status(entry)

    async def remove(self, name: str) -> AdapterStatus:
        """Stops serving an adapter; its files stay where they are.

        Raises:
            UnknownModelError: it is not served.
        """
        async with self._locks.setdefault(name, asyncio.Lock()):
            entry = self._current.pop(name, None)
            if entry is None:
                raise UnknownModelError(
                    f"adapter {name[:80]!r} is not served; served are {sorted(self._current)}",
                    param="name",
                )
            self._retire(entry)
            self._announce()
            await self._known_to_all()
            self._keep(name, Choice(is_removed=True))
            return self._status(entry)

    async def follow(self, report: Report) -> Snapshot:
        """Takes a follower's report; returns at the next change, or after `POLL_S` without one."""
        member = self._members.setdefault(report.member, _Member(report, 0.0))
        is_news = report.prepared != member.report.prepared or report.held != member.report.held
        member.report, member.last_s = report, time.monotonic()
        member.num_open += 1
        try:
            self._note_holders()
            if is_news or report.seen == self._number:
                self._news.beat()
            await self._news.until(lambda: self._number != report.seen, POLL_S)
            return self.snapshot()
        finally:
            member.num_open -= 1
            member.last_s = time.monotonic()

    def snapshot(self) -> Snapshot:
        """What holds now."""
        return Snapshot(
            number=self._number,
            served={
                name: entry.installed
                for name, entry in self._current.items()
                if entry.installed is not None
            },
            preparing=tuple(self._preparing.values()),
            draining=frozenset(
                entry.adapter.key
                for entry in self._entries.values()
                if entry.state is State.DRAINING and entry.installed
            ),
            pinned=frozenset(e.adapter.key for e in self._current.values() if e.is_pinned),
            statuses=tuple(self.statuses()),
        )

    def statuses(self) -> list[AdapterStatus]:
        """Of every version that is known, by name."""
        ordered = sorted(self._entries.values(), key=lambda e: (e.source.name, e.source.age))
        return [self._status(entry) for entry in ordered]

    @property
    def num_engines(self) -> int:
        """Engines that follow."""
        return len(self._live("engine"))

    def _status(self, entry: _Entry) -> AdapterStatus:
        return AdapterStatus(
            name=entry.source.name,
            version=entry.source.version,
            state=entry.state,
            reason=entry.reason,
            is_pinned=entry.is_pinned,
            num_holders=self._holders(entry),
        )

    async def _find(self, name: str, version: str | None) -> _Entry:
        if self._folder is None:
            raise AdapterError(
                "this server was started without --adapters; start it with a folder of adapters"
            )
        sources = [s for s in await asyncio.to_thread(self._folder.list) if s.name == name]
        matching = [s for s in sources if version is None or s.version == version]
        if not matching:
            raise UnknownModelError(
                f"the adapters folder has no adapter {name[:80]!r}"
                + (f" of version {version[:80]!r}" if version is not None and sources else "")
                + (f"; there are versions {[s.version for s in sources]}" if sources else "")
                + "; put it there as a subfolder 'name' or 'name@version' first",
                param="name",
            )
        source = matching[-1]
        return self._entries.setdefault((source.name, source.version), _Entry(source=source))

    def _check_pins(self, entry: _Entry, pin: bool | None) -> None:
        others = [e for n, e in self._current.items() if e.is_pinned and n != entry.source.name]
        if pin and len(others) >= self.max_pinned:
            raise AdapterError(
                f"{len(others)} adapters are pinned already, allowed are {self.max_pinned} (one "
                "less than --max-loras); remove one of them first",
                param="pin",
            )

    async def _verify(self, entry: _Entry) -> None:
        """Everything that can be known without an engine."""
        source = entry.source
        others = {n: e.installed for n, e in self._current.items() if e.installed}
        others.pop(source.name, None)
        with self._refusal(entry):
            installed = await asyncio.to_thread(self._inspect, source, others)
            entry.installed = installed
        if entry.state in (State.DISCOVERED, State.REFUSED, State.UNLOADED):
            entry.state = State.VERIFIED
        entry.reason = None

    def _inspect(
        self, source: AdapterSource, others: Mapping[str, InstalledAdapter]
    ) -> InstalledAdapter:
        assert self._folder is not None
        if self._folder.is_local:
            return self._identified(Path(source.path), source, others)
        with tempfile.TemporaryDirectory(prefix="sieve-verify-") as folder:
            copy_adapter(source.path, Path(folder))
            return self._identified(Path(folder), source, others)

    def _identified(
        self, folder: Path, source: AdapterSource, others: Mapping[str, InstalledAdapter]
    ) -> InstalledAdapter:
        installed = self._check(folder, source.name, others)
        adapter = replace(
            installed.adapter,
            path=source.path,
            version=source.version,
            digest=digest_of(folder),
        )
        return replace(installed, adapter=adapter)

    async def _prepare(self, entry: _Entry) -> None:
        """Has every engine load an adapter before a request needs it."""
        adapter = entry.adapter
        self._preparing[adapter.key] = adapter
        self._announce()
        try:
            with self._refusal(entry):
                await self._prepared_by_all(adapter)
        finally:
            self._preparing.pop(adapter.key, None)
            self._announce()

    async def _prepared_by_all(self, adapter: Adapter) -> None:
        def answers() -> list[Report]:
            return [report for report in self._live("engine") if adapter.key in report.prepared]

        def is_done() -> bool:
            reasons = [report.prepared[adapter.key] for report in answers()]
            return any(reasons) or len(reasons) == len(self._live("engine"))

        await self._news.until(is_done, _PREPARE_TIMEOUT_S)
        for report in answers():
            reason = report.prepared[adapter.key]
            if reason is not None:
                raise AdapterError(reason)
        if not is_done():
            raise AdapterError(f"adapter {adapter.name!r}: engines took too long to load it")

    @contextmanager
    def _refusal(self, entry: _Entry) -> Iterator[None]:
        """An adapter that fails is refused, unless it is being served: then it stays as it is."""
        try:
            yield
        except AdapterError as error:
            if self._current.get(entry.source.name) is not entry:
                entry.state, entry.reason = State.REFUSED, error.message
                self._announce()
            raise

    def _retire(self, entry: _Entry | None) -> None:
        if entry is None:
            return
        entry.is_pinned = False
        entry.state = State.DRAINING
        task = asyncio.create_task(self._drain(entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, entry: _Entry) -> None:
        """Engines may drop a version once no HTTP side sends for it; they answer what came."""
        await self._known_to_all()
        if entry.state is not State.DRAINING:  # it serves again
            return
        key = entry.adapter.key
        entry.state = State.UNLOADED
        if any(other.adapter.key == key for other in self._current.values()):
            entry.state = State.VERIFIED  # the same files under another version
        unloaded = [k for k, e in self._entries.items() if e.state is State.UNLOADED]
        for surplus in unloaded[:-_MOST_UNLOADED]:
            del self._entries[surplus]
        self._announce()

    async def _known_to_all(self) -> None:
        """Waits until every live HTTP side has acted on what holds now."""
        number = self._number
        await self._news.until(
            lambda: all(report.seen >= number for report in self._live("http")), MEMBER_TTL_S
        )

    def _live(self, kind: str) -> list[Report]:
        oldest = time.monotonic() - MEMBER_TTL_S
        self._members = {
            name: member
            for name, member in self._members.items()
            if member.num_open or member.last_s > oldest
        }
        return [m.report for m in self._members.values() if m.report.kind == kind]

    def _holders(self, entry: _Entry) -> int:
        if entry.installed is None:
            return 0
        return sum(entry.adapter.key in report.held for report in self._live("engine"))

    def _note_holders(self) -> None:
        """A served version is loaded where an engine has it, else verified: on disk, ready."""
        for entry in self._current.values():
            entry.state = State.LOADED if self._holders(entry) else State.VERIFIED

    def _announce(self) -> None:
        self._number += 1
        self._news.beat()

    def _keep(self, name: str, choice: Choice) -> None:
        assert self._folder is not None
        keep_choice(self._folder, name, choice)
