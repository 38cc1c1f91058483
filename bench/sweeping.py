"""The measuring part of a sweep: blocks in closed loop, probes in open loop, and their order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.cells import Cell
from bench.generator import Planned, Request, Senders, Sending, write_requests
from bench.goodput import Goal, Probe, Search
from bench.mix import Content, label_body
from bench.outcome import progress
from bench.pictures import nudged
from bench.profiles import Phase, schedule
from bench.statistics import interleaved
from serving.client_key import bearer_headers

CONNECTIONS = (4, 8, 16, 32, 64)
GAIN = 1.1
"""Twice as many connections must give so many times the rate, or they are enough."""
_START_IN_S = 0.2
_PNG = "data:image/png;"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Posts that a cell answered in closed loop.

    Attributes:
        round: of the sweep.
        cell: what was asked.
        rows: in the order of the posts.
    """

    round: int
    cell: Cell
    rows: Sequence[Request]

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        return max(row.done_s for row in self.rows) - min(row.sent_s for row in self.rows)

    @property
    def num_failed(self) -> int:
        """Posts without labels."""
        return sum(row.status != 200 for row in self.rows)

    @property
    def posts_per_s(self) -> float:
        """Labelled posts a second."""
        return (len(self.rows) - self.num_failed) / self.seconds


@dataclass(kw_only=True)
class Found:
    """Everything that a sweep measured.

    Attributes:
        posts: by id.
        levels: posts/s by connections, at the highest and the lowest ratio.
        connections: of all blocks.
        blocks: of the rounds.
        drift: the first and the last block, both at ratio 1.0.
        searches: for goodput, by the cell's name.
        num_images: that were sent to the tower's server since the counter was read first.
        num_tower_images: that went through its tower meanwhile; None where it does not say.
    """

    posts: Mapping[str, Content]
    levels: list[tuple[Cell, int, float]] = field(default_factory=list)
    connections: int = 0
    blocks: list[Block] = field(default_factory=list)
    drift: list[Block] = field(default_factory=list)
    searches: dict[str, tuple[Cell, Search]] = field(default_factory=dict)
    num_images: int = 0
    num_tower_images: int | None = None

    def of(self, cell: Cell) -> list[Block]:
        """The blocks of a cell, by round."""
        found = [block for block in self.blocks if block.cell == cell]
        return sorted(found, key=lambda block: block.round)

    def all_rows(self) -> list[Request]:
        """Every request of blocks and probes, its phase saying which."""
        parts = [block.rows for block in [*self.drift, *self.blocks]]
        parts += [probe.rows for _, search in self.searches.values() for probe in search.probes]
        return [row for rows in parts for row in rows]


class Sweeper:
    """Sends blocks and probes to one server.

    Args:
        url: of the server.
        senders: that send.
        folder: for plans, on this machine.
        model: model or adapter that requests name; None leaves it to the server.
        timeout_s: until a request is given up.
    """

    def __init__(
        self, url: str, senders: Senders, folder: Path, model: str | None, timeout_s: float
    ) -> None:
        self._url, self._senders, self._folder = url, senders, folder
        self._common: dict[str, Any] = {} if model is None else {"model": model}
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self.num_images = 0

    def block(self, cell: Cell, posts: Sequence[Content], connections: int, phase: str) -> Block:
        """The posts through so many connections."""
        planned = [self._planned(cell, post, phase) for post in posts]
        sending = self._sending(loop="closed", most_in_flight=connections)
        return Block(round=0, cell=cell, rows=self._send(planned, sending))

    def probe(self, cell: Cell, posts: Iterable[Content], load: float, search: Search) -> Probe:
        """Poisson arrivals at a share of the saturated rate, as many as there are posts."""
        posts = list(posts)
        rate = load * search.capacity
        seed = [round(1e3 * value) for value in (load, cell.ratio, len(search.probes))]
        seconds = 1.5 * len(posts) / rate + 5.0
        phase = Phase(name=f"open {load:g}", seconds=seconds, start=rate, end=rate)
        arrivals = schedule([phase], int(np.random.default_rng(seed).integers(1 << 30)))
        planned = [
            replace(self._planned(cell, post, arrival.phase), at_s=arrival.at_s)
            for post, arrival in zip(posts, arrivals, strict=False)
        ]
        return Probe(load=load, rate=rate, rows=self._send(planned, self._sending()))

    def _send(self, planned: Sequence[Planned], sending: Sending) -> list[Request]:
        write_requests(self._folder, planned, sending)
        return self._senders.send(self._folder, _START_IN_S)

    def _sending(self, **chosen: Any) -> Sending:
        return Sending(url=self._url, timeout_s=self._timeout_s, **chosen)

    def _planned(self, cell: Cell, post: Content, phase: str) -> Planned:
        """A request whose PNGs no cache has seen; other formats are sent as they are."""
        images = tuple(
            nudged(url, next(self._numbers)) if url.startswith(_PNG) else url for url in post.images
        )
        self.num_images += len(images)
        asked = {**self._common, **cell.asked}
        return Planned(
            body=label_body(replace(post, images=images), asked), id=post.id, phase=phase
        )

    def tower_images(self) -> int | None:
        """Images that went through the server's tower; None where it does not say."""
        answer = httpx.get(f"{self._url}/metrics", headers=bearer_headers(), timeout=30)
        for line in answer.text.splitlines():
            if line.startswith("sieve_tower_images "):
                return int(float(line.split()[1]))
        return None


def find_connections(
    sweeper: Sweeper, cells: Sequence[Cell], posts: Sequence[Content], found: Found
) -> int:
    """Connections that saturate the server at every one of the cells; also warms it up."""
    enough = CONNECTIONS[0]
    for cell in cells:
        best = 0.0
        for connections in CONNECTIONS:
            rate = sweeper.block(cell, posts, connections, "connections").posts_per_s
            found.levels.append((cell, connections, rate))
            progress(f"{cell.name:12} {connections:4} connections: {rate:6.1f} posts/s")
            if rate < GAIN * best:
                break
            best, enough = max(best, rate), max(enough, connections)
    return enough


def run_rounds(
    sweeper: Sweeper,
    cells: Sequence[Cell],
    rounds: Sequence[Sequence[Content]],
    seed: int,
    found: Found,
) -> None:
    """Every cell once a round, each round with its own posts, in an order drawn anew."""
    by_name = {cell.name: cell for cell in cells}
    for index, name in interleaved(list(by_name), len(rounds), seed):
        phase = f"saturated {index + 1}"
        block = sweeper.block(by_name[name], rounds[index], found.connections, phase)
        found.blocks.append(replace(block, round=index))
        progress(f"round {index + 1}/{len(rounds)} {name:12} {block.posts_per_s:6.1f} posts/s")


def search_goodput(
    sweeper: Sweeper,
    cells: Sequence[Cell],
    posts: Sequence[Content],
    goal: Goal,
    seed: int,
    found: Found,
) -> None:
    """One probe of every cell, in an order drawn anew, until all searches are at their end."""
    rng = np.random.default_rng((seed, 11))
    for cell in cells:
        capacity = float(np.median([block.posts_per_s for block in found.of(cell)]))
        found.searches[cell.name] = cell, Search(capacity=capacity, goal=goal)
    while True:
        open_ = [name for name, (_, search) in found.searches.items() if search.next_load]
        if not open_:
            return
        for place in rng.permutation(len(open_)):
            cell, search = found.searches[open_[place]]
            _probe(sweeper, cell, search, posts)


def _probe(sweeper: Sweeper, cell: Cell, search: Search, posts: Sequence[Content]) -> None:
    load = search.next_load
    assert load is not None
    probe = sweeper.probe(cell, posts, load, search)
    search.add(probe)
    verdict = "void" if probe.void else "meets" if probe.is_met(search.goal) else "misses"
    within = probe.within(search.goal)
    progress(f"{cell.name:12} {probe.rate:6.1f}/s ({load:.0%} of full) {verdict}: {within} in time")
