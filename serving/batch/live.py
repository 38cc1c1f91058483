"""An engine that is started again when it ends, and the post that ended it found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

from serving.batch.outcomes import Failure
from serving.errors import EngineDeadError
from serving.labeler import Labeler

T = TypeVar("T")
Start = Callable[[], AbstractAsyncContextManager[Labeler]]
MOST_IN_A_ROW = 3


class LiveLabeler:
    """Does work on a labeler whose engine may end under it.

    Work that was in an engine when it ended is done again, alone: so one post costs the run two
    starts of the engine at most, and is a failure if the engine ends on it again.

    Args:
        start: starts a labeler with its engine.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._stack = AsyncExitStack()
        self._labeler: Labeler | None = None
        self._generation = 0
        self._crashes = 0
        self._num_working = self._num_suspects = 0
        self._changed = asyncio.Condition()
        self._alone = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def running(cls, start: Start) -> AsyncIterator[LiveLabeler]:
        """Started, and stopped at the end of the block."""
        live = cls(start)
        await live._restart()
        try:
            yield live
        finally:
            await live._stack.aclose()

    @property
    def labeler(self) -> Labeler:
        """The labeler on the engine of now."""
        assert self._labeler is not None, "it is started"
        return self._labeler

    async def _restart(self) -> None:
        await self._stack.aclose()
        self._stack = AsyncExitStack()
        self._labeler = await self._stack.enter_async_context(self._start())
        self._generation += 1

    async def do(self, work: Callable[[Labeler], Awaitable[T]]) -> T:
        """Does the work, a second time if the engine ends.

        Raises:
            Failure: the engine ended on it when it was alone.
            EngineDeadError: that happened several times with nothing done in between.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_suspects == 0)
            self._num_working += 1
        generation = self._generation
        try:
            answer = await work(self.labeler)
            self._crashes = 0
            return answer
        except EngineDeadError:
            self._num_suspects += 1
        finally:
            await self._leave()
        try:
            return await self._do_alone(work, generation)
        finally:
            self._num_suspects -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _leave(self) -> None:
        self._num_working -= 1
        async with self._changed:
            self._changed.notify_all()

    async def _do_alone(self, work: Callable[[Labeler], Awaitable[T]], generation: int) -> T:
        async with self._alone:
            async with self._changed:
                await self._changed.wait_for(lambda: self._num_working == 0)
            if generation == self._generation:
                await self._restart()
            try:
                answer = await work(self.labeler)
            except EngineDeadError as error:
                self._crashes += 1
                if self._crashes >= MOST_IN_A_ROW:
                    raise EngineDeadError(
                        f"the engine ended on {self._crashes} posts in a row, each alone in it; "
                        "what is labelled stays, run the same command again to go on"
                    ) from error
                await self._restart()
                raise Failure(
                    "label",
                    "the engine ended on this post, twice, the second time alone in it",
                    code="engine_crashed",
                    can_retry=True,
                ) from error
            self._crashes = 0
            return answer
