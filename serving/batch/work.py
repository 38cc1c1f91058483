"""The posts of a run on their way: read, prepared, answered, journalled, published by shards."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from serving.batch.counts import Counts
from serving.batch.outcomes import Answer, Failure, Outcome
from serving.batch.prepare import Prepared
from serving.batch.shards import IdsDigest, Journal, RunFolder
from serving.batch.tables import FORMATS, Table, write_errors, write_review
from serving.errors import ConfigError
from serving.posts import Post, Unreadable

Entry = Post | Unreadable
CHUNK = 16
"""Posts that go to a worker at once."""


class Prepares(Protocol):
    """Prepares posts; `serving.batch.prepare.Preparer`."""

    num_workers: int

    async def prepare(self, posts: list[Post]) -> list[Prepared | Failure]:
        """In order."""


Answers = Callable[[Post, Prepared], Awaitable[tuple[tuple[Answer, ...], bool]]]
"""A prepared post's answers, and whether an equal post had them; raises `Failure`."""


@dataclass(kw_only=True)
class OpenShard:
    """A shard being worked on."""

    index: int
    journal: Journal
    ids: IdsDigest
    is_published: bool = False

    def take_if_done(self) -> bool:
        """Whether every post of it has an outcome; true once."""
        if self.is_published or len(self.journal.outcomes) < self.ids.num_ids:
            return False
        self.is_published = True
        return True


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some posts of one shard, by their place in the input."""

    shard: OpenShard
    entries: list[tuple[int, Entry]]


class Work:
    """Labels the posts of a source that have no published row yet.

    Memory holds a fixed number of posts, whatever the source's length.

    Args:
        folder: where rows go.
        table: what rows look like.
        format: a name in `FORMATS`.
        shard_size: posts a shard.
        retries_failed: whether failed posts are tried again.
        shards: only these; None for all.
    """

    def __init__(
        self,
        folder: RunFolder,
        table: Table,
        *,
        format: str,
        shard_size: int,
        retries_failed: bool = False,
        shards: frozenset[int] | None = None,
    ) -> None:
        self.folder, self.table, self.format = folder, table, format
        self.shard_size, self.retries_failed = shard_size, retries_failed
        self._wanted = shards
        self._commits = folder.commits()
        self._on_done: Callable[[Outcome], None] = lambda outcome: None

    @property
    def num_done(self) -> int:
        """Posts that had a published row at the start."""
        return sum(commit["posts"] for commit in self._commits.values())

    @property
    def num_failed(self) -> int:
        """Of those, how many are errors."""
        return sum(commit["failed"] for commit in self._commits.values())

    async def run(
        self,
        entries: Iterable[Entry],
        preparer: Prepares,
        answer: Answers,
        *,
        concurrency: int,
        on_done: Callable[[Outcome], None],
    ) -> None:
        """Labels what is not labelled yet.

        Args:
            entries: all posts of the source, in its order.
            preparer: decodes images.
            answer: labels one prepared post.
            concurrency: most posts in the engine.
            on_done: told every outcome of this run, as it comes.

        Raises:
            ConfigError: the source changed, or the output cannot be written.
            EngineDeadError: the engine cannot be kept up.
        """
        self._on_done = on_done
        gate = asyncio.Semaphore(concurrency)
        ahead = asyncio.Semaphore(2 * concurrency // CHUNK + preparer.num_workers + 2)
        chunks = self._chunks(entries)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await ahead.acquire()
                    chunk = await asyncio.to_thread(next, chunks, None)
                    if chunk is None:
                        break
                    done = self._do_chunk(chunk, preparer, answer, gate)
                    tasks.create_task(done).add_done_callback(lambda _: ahead.release())
        except* Exception as group:
            raise _first(group) from None

    def _chunks(self, entries: Iterable[Entry]) -> Iterator[Chunk]:
        """Posts that are not done yet; runs in a thread, ahead of the rest."""
        numbered = enumerate(entries)
        for index in itertools.count():
            shard = list(itertools.islice(numbered, self.shard_size))
            if not shard:
                return
            yield from self._chunks_of(index, shard)

    def _chunks_of(self, index: int, numbered: list[tuple[int, Entry]]) -> Iterator[Chunk]:
        if self._wanted is not None and index not in self._wanted:
            return
        digest = IdsDigest()
        for _, entry in numbered:
            digest.add(entry.id)
        commit = self._commits.get(index)
        if commit is not None and commit["ids"] != digest.hexdigest():
            raise _changed(numbered)
        if commit is not None and not (self.retries_failed and commit["failed"]):
            return
        journal = Journal(self.folder.journal(index), keeps_errors=not self.retries_failed)
        ids = {number: entry.id for number, entry in numbered}
        if any(ids.get(number) != known.id for number, known in journal.outcomes.items()):
            raise _changed(numbered)
        shard = OpenShard(index=index, journal=journal, ids=digest)
        todo = [item for item in numbered if item[0] not in journal.outcomes]
        for start in range(0, len(todo), CHUNK):
            yield Chunk(shard=shard, entries=todo[start : start + CHUNK])
        if not todo:
            yield Chunk(shard=shard, entries=[])

    async def _do_chunk(
        self, chunk: Chunk, preparer: Prepares, answer: Answers, gate: asyncio.Semaphore
    ) -> None:
        posts = [entry for _, entry in chunk.entries if isinstance(entry, Post)]
        prepared = iter(await preparer.prepare(posts))
        ready = [
            (index, entry, next(prepared) if isinstance(entry, Post) else None)
            for index, entry in chunk.entries
        ]

        async def do(index: int, entry: Entry, found: Prepared | Failure | None) -> None:
            async with gate:
                outcome = await self._outcome(index, entry, found, answer)
            chunk.shard.journal.add(outcome)
            self._on_done(outcome)

        async with asyncio.TaskGroup() as tasks:
            for item in ready:
                tasks.create_task(do(*item))
        if chunk.shard.take_if_done():
            await asyncio.to_thread(self._publish, chunk.shard)

    async def _outcome(
        self, index: int, entry: Entry, prepared: Prepared | Failure | None, answer: Answers
    ) -> Outcome:
        known: dict[str, str] = {}
        try:
            if isinstance(entry, Unreadable):
                raise Failure("read", entry.message, code="unreadable_row")
            known = dict(entry.labels)
            if isinstance(prepared, Failure):
                raise prepared
            assert prepared is not None
            answers, is_repeat = await answer(entry, prepared)
        except Failure as failure:
            return Outcome(index=index, id=entry.id, error=failure.as_dict(), known=known)
        review = _review(entry) if self.table.abstains(answers) else None
        return Outcome(
            index=index,
            id=entry.id,
            answers=answers,
            known=known,
            review=review,
            is_repeat=is_repeat,
        )

    def _publish(self, shard: OpenShard) -> None:
        outcomes = [outcome for _, outcome in sorted(shard.journal.outcomes.items())]
        labelled = [outcome for outcome in outcomes if outcome.error is None]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        unsure = [outcome for outcome in labelled if outcome.review is not None]
        counts = Counts()
        for outcome in outcomes:
            counts.add(outcome, abstains=outcome.review is not None)
        write = FORMATS[self.format]
        files: dict[str, Any] = {
            f"labels.{self.format}": lambda path: write(self.table, labelled, path)
        }
        if failed:
            files["errors.jsonl"] = lambda path: write_errors(failed, path)
        if unsure:
            files["review.jsonl"] = lambda path: write_review(unsure, path)
        self.folder.publish(
            shard.index,
            files,
            {
                "posts": len(outcomes),
                "failed": len(failed),
                "ids": shard.ids.hexdigest(),
                "counts": counts.as_json(),
            },
        )
        shard.journal.close()
        if not failed:  # failed posts may be tried again, beside what the journal has of the others
            shard.journal.path.unlink()


def _changed(numbered: list[tuple[int, Entry]]) -> ConfigError:
    first, last = numbered[0][0] + 1, numbered[-1][0] + 1
    return ConfigError(
        f"posts {first} to {last} of the data are not those that this run labelled: it changed "
        "since; name another --out",
        param="data",
    )


def _review(post: Post) -> dict[str, Any]:
    names = [getattr(item, "name", "inline") for item in post.images]
    return {"text": post.text, "images": names}


def _first(group: BaseExceptionGroup) -> BaseException:
    """The error to tell: one of a group, however deep."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
