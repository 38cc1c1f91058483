"""An engine in an actor of Ray Data, which labels the shards that it is given."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from serving.app import image_limits
from serving.batch.answering import Answerer
from serving.batch.job import Plan
from serving.batch.live import LiveLabeler
from serving.batch.options import BatchOptions
from serving.batch.outcomes import Outcome
from serving.batch.prepare import Preparer
from serving.batch.shards import IdsDigest, RunFolder
from serving.batch.work import Entry
from serving.errors import ConfigError, SieveError
from serving.fitting import Fitting
from serving.posts import Posts
from serving.settings import Settings

AT_ONCE = 2
"""Shards in work at one engine: while one ends the next has begun."""
_END_S = 60.0


class ShardReader:
    """Shards of a source; one reading serves all that are asked for in rising order.

    Args:
        posts: the source.
        folder: what is passed over must be what the run has labelled there.
        shard_size: posts a shard.
    """

    def __init__(self, posts: Posts, folder: RunFolder, shard_size: int) -> None:
        self._posts, self._folder, self._size = posts, folder, shard_size
        self._lock = threading.Lock()
        self._entries: Iterator[Entry] = iter(())
        self._next = -1

    def shard(self, index: int) -> list[Entry]:
        """The posts of a shard; memory holds those of `AT_ONCE` shards.

        Raises:
            ConfigError: the source cannot be read, or changed since the run began.
        """
        with self._lock:
            if self._next < 0 or index < self._next:
                self._entries, self._next = self._posts.entries(), 0
            while self._next < index:
                self._pass_over()
            self._next += 1
            return list(islice(self._entries, self._size))

    def _pass_over(self) -> None:
        digest = IdsDigest()
        for entry in islice(self._entries, self._size):
            digest.add(entry.id)
        known = self._folder.commits((self._next,)).get(self._next)
        if known is not None and known["ids"] != digest.hexdigest():
            first = self._next * self._size + 1
            raise ConfigError(
                f"posts {first} to {first + self._size - 1} of the data are not those that this "
                "run labelled: it changed since; name another --out",
                param="data",
            )
        self._next += 1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What an engine needs at hand to label shards."""

    plan: Plan
    folder: RunFolder
    reader: ShardReader
    preparer: Preparer
    answerer: Answerer
    live: LiveLabeler
    start_s: float


class ShardWorker:
    """For `ray.data.Dataset.map_batches`: from numbers of shards to what became of them.

    Its shards are published into the run's folder, which all nodes must see at the same path. An
    actor that is killed loses nothing: Ray gives its shards to another one, which goes on from
    their journals. The engine starts with the first shard; errors come back as values, because
    Ray wraps those that are raised.

    Args:
        options: of the batch.
        settings: of the engine.
        cwd: the driver's working folder, which relative paths start from.
    """

    def __init__(self, options: BatchOptions, settings: Settings, cwd: str) -> None:
        self._options, self._settings, self._cwd = options, settings, cwd
        self._stack = AsyncExitStack()
        self._loop = asyncio.new_event_loop()
        self._opening: asyncio.Task[Bench] | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Labels the shard of a one-row batch; may be called by several threads."""
        (index,) = batch["item"].tolist()
        try:
            done = asyncio.run_coroutine_threadsafe(self._label(index), self._loop).result()
        except SieveError as error:
            done = {"error": error.message, "param": error.param, "status": error.status}
        return {"done": [json.dumps(done)]}

    def __del__(self) -> None:
        """Ends the engine and its workers; Ray deletes the actor's object before it ends it."""
        asyncio.run_coroutine_threadsafe(self._stack.aclose(), self._loop).result(_END_S)

    async def _label(self, index: int) -> dict[str, Any]:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        bench = await self._opening
        counts: Counter[str] = Counter()
        entries = await asyncio.to_thread(bench.reader.shard, index)
        await bench.plan.work(bench.folder, frozenset({index})).run(
            entries,
            bench.preparer,
            lambda post, found: bench.live.do(
                partial(bench.answerer.answer, post=post, prepared=found)
            ),
            concurrency=self._options.concurrency,
            on_done=partial(_count, counts),
            first_shard=index,
        )
        return {"shard": index, "start_s": bench.start_s, **counts}

    async def _open(self) -> Bench:
        """Starts the engine and all around it.

        Raises:
            SieveError: it cannot start, or this node does not see the run as the driver does.
        """
        began = time.monotonic()
        folder = self._run_folder()
        plan = await Plan.make(self._options, self._settings)
        self._stack.enter_context(folder.helped())
        folder.check_same(plan.identity())
        fitting = await asyncio.to_thread(Fitting.of, self._settings.model)
        limits, workers = image_limits(self._settings), self._options.num_workers
        preparer = Preparer(limits, fitting, num_workers=workers)
        self._stack.callback(preparer.close)
        preparer.start()
        live = await self._stack.enter_async_context(LiveLabeler.running(plan.labeling))
        return Bench(
            plan=plan,
            folder=folder,
            reader=ShardReader(plan.posts(), folder, self._options.shard_size),
            preparer=preparer,
            answerer=Answerer(plan.asked),
            live=live,
            start_s=time.monotonic() - began,
        )

    def _run_folder(self) -> RunFolder:
        out = Path(self._cwd) / self._options.out
        if not RunFolder.is_begun(out):
            raise ConfigError(
                f"out={str(out)!r} is not there on {platform.node()}; with --ray, data, adapters "
                "and out must be at the same path on every node",
                param="out",
            )
        os.chdir(self._cwd)
        return RunFolder(self._options.out)


def _count(counts: Counter[str], outcome: Outcome) -> None:
    counts["posts"] += 1
    counts["failed"] += outcome.error is not None
    counts["kept"] += sum(answer.visual_tokens for answer in outcome.answers)
    counts["patches"] += sum(answer.patches for answer in outcome.answers)
