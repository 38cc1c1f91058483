"""What the adapter registry and its followers tell each other; plain values that cross to Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from serving.adapters import InstalledAdapter
from serving.protocol import Adapter


class State(StrEnum):
    """Where an adapter version is in its life."""

    DISCOVERED = "discovered"
    REFUSED = "refused"
    VERIFIED = "verified"
    LOADED = "loaded"
    DRAINING = "draining"
    UNLOADED = "unloaded"


@dataclass(frozen=True, kw_only=True)
class AdapterStatus:
    """One version, for people and metrics; no path."""

    name: str
    version: str
    state: State
    reason: str | None = None
    is_pinned: bool = False
    num_holders: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What all agree on.

    Attributes:
        number: rises with every change.
        served: by name, the version that answers.
        preparing: versions that engines load now, before they are served.
        draining: keys of versions that may still have requests.
        pinned: keys that engines never evict.
        statuses: of every version.
    """

    number: int
    served: Mapping[str, InstalledAdapter]
    preparing: tuple[Adapter, ...] = ()
    draining: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()
    statuses: tuple[AdapterStatus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a follower says when it asks for news.

    Attributes:
        member: its name, unique among followers.
        kind: engines load adapters, HTTP sides send requests for them; who starts just looks.
        seen: number of the last snapshot it acted on; -1 at first.
        prepared: an engine's answers by key: None where it loaded, else why not.
        held: keys an engine has in memory.
    """

    member: str
    kind: Literal["engine", "http", "start"]
    seen: int = -1
    prepared: Mapping[str, str | None] = field(default_factory=dict)
    held: frozenset[str] = frozenset()


Follow = Callable[[Report], Awaitable[Snapshot]]
"""`Registry.follow`, direct or through a Ray handle."""
