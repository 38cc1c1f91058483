"""The posts of a run on their way: read, prepared, answered, journalled, published by shards."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


@dataclass(kw_only=True, eq=False)
class OpenShard:
    """A shard being worked on."""

    index: int
    journal: Journal
    ids: IdsDigest
    is_read: bool = False
    is_published: bool = False

    def take_if_done(self) -> bool:
        """Whether it is read to its end and every post of it has an outcome; true once."""
        num_known = len(self.journal.outcomes)
        if self.is_published or not self.is_read or num_known < self.ids.num_ids:
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
        self._commits = folder.commits(shards)
        self._opened: set[OpenShard] = set()
        self._threads = ThreadPoolExecutor(2)  # one reads, one publishes
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
        first_shard: int = 0,
    ) -> None:
        """Labels what is not labelled yet; once.

        Args:
            entries: posts of the source, in its order.
            preparer: decodes images.
            answer: labels one prepared post.
            concurrency: most posts in the engine.
            on_done: told every outcome of this run, as it comes.
            first_shard: the shard that entries begin with.

        Raises:
            ConfigError: the source changed, or the output cannot be written.
            EngineDeadError: the engine cannot be kept up.
        """
        self._on_done = on_done
        gate = asyncio.Semaphore(concurrency)
        ahead = asyncio.Semaphore(2 * concurrency // CHUNK + preparer.num_workers + 2)
        chunks = self._chunks(entries, first_shard)
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            with self._threads:  # a run that ends early leaves no thread at work in the folder
                async with asyncio.TaskGroup() as tasks:
                    while True:
                        await ahead.acquire()
                        chunk = await in_thread(self._threads, next, chunks, None)
                        if chunk is None:
                            break
                        done = self._do_chunk(chunk, preparer, answer, gate)
                        tasks.create_task(done).add_done_callback(lambda _: ahead.release())
        except* Exception as group:
            raise _first(group) from None
        finally:
            for shard in self._opened:
                shard.journal.close()

    def _chunks(self, entries: Iterable[Entry], first_shard: int) -> Iterator[Chunk]:
        """Posts that are not done yet; runs in a thread, ahead of the rest."""
        numbered = enumerate(entries, first_shard * self.shard_size)
        for index in itertools.count(first_shard):
            first = next(numbered, None)
            if first is None:
                return
            rest = itertools.islice(numbered, self.shard_size - 1)
            yield from self._chunks_of(index, itertools.chain((first,), rest))

    def _chunks_of(self, index: int, numbered: Iterator[tuple[int, Entry]]) -> Iterator[Chunk]:
        """Chunks of one shard, which is never held whole: rows may have images within them."""
        commit, shard = self._commits.get(index), self._open(index)
        ids = IdsDigest() if shard is None else shard.ids
        num_before = 0 if shard is None else len(shard.journal.outcomes)
        todo: list[tuple[int, Entry]] = []
        for number, entry in numbered:
            ids.add(entry.id)
            if shard is None:
                continue
            known = shard.journal.outcomes.get(number)
            if known is None:
                todo.append((number, entry))
            elif known.id == entry.id:
                num_before -= 1
            else:
                raise self._changed(index)
            if len(todo) == CHUNK:
                yield Chunk(shard=shard, entries=todo)
                todo = []
        if num_before or (commit is not None and commit["ids"] != ids.hexdigest()):
            raise self._changed(index)
        if shard is not None:
            shard.is_read = True
            yield Chunk(shard=shard, entries=todo)

    def _open(self, index: int) -> OpenShard | None:
        """A shard that has posts to label; None where it is done, or not this worker's."""
        commit = self._commits.get(index)
        if self._wanted is not None and index not in self._wanted:
            return None
        if commit is not None and not (self.retries_failed and commit["failed"]):
            return None
        journal = Journal(self.folder.journal(index), keeps_errors=not self.retries_failed)
        shard = OpenShard(index=index, journal=journal, ids=IdsDigest())
        self._opened.add(shard)
        return shard

    def _changed(self, index: int) -> ConfigError:
        first = index * self.shard_size + 1
        return ConfigError(
            f"among the {self.shard_size} posts from number {first} on are others than those that "
            "this run labelled: the data changed since; name another --out",
            param="data",
        )

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
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._publish, chunk.shard)

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
        self._opened.discard(shard)
        if not failed:  # failed posts may be tried again, beside what the journal has of the others
            shard.journal.path.unlink()


def _review(post: Post) -> dict[str, Any]:
    names = [getattr(item, "name", "inline") for item in post.images]
    return {"text": post.text, "images": names}


def _first(group: BaseExceptionGroup) -> BaseException:
    """The error to tell: one of a group, however deep."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
