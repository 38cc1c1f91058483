"""An engine that is kept up: its death or hang is noticed, and it is started again.

Dead is an engine whose core or worker is gone: vLLM says so within a moment. Hung is one that does
not answer a ping for `hang_timeout_s`. A ping goes through the core to the worker and waits behind
the step that runs, so a long step is a hang only if it alone lasts longer than that. Only seconds
in which this process itself ran are counted: one that was stopped, or starved, accuses nobody.

`until_lost` serves both homes. In one process, `WatchedEngine` replaces the engine; on Ray, the
replica ends and Serve starts another.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serving.errors import (
    EngineDeadError,
    EngineLostError,
    EngineRestartingError,
    SieveError,
)
from serving.loaded_adapters import LoadedAdapters
from serving.metrics import EngineMetrics
from serving.protocol import ChatCall, Engine, EngineInfo, Explanation, Generated, Generation
from serving.pulse import Pulse
from serving.suspects import Suspects

logger = logging.getLogger("sieve.engine")

Reason = Literal["died", "hung"]

LOOK_S = 0.5
PING_S = 2.0
STABLE_S = 60.0
"""An engine that lived so long was well; restarts are counted from zero again."""
_SLICE_S = 0.5
_MOST_BACKOFF_S = 30.0
_LAST_WORDS_S = 5.0


class MortalEngine(Engine, Protocol):
    """An engine that can be asked for a sign of life, and ended whatever state it is in."""

    adapters: LoadedAdapters

    async def ping(self) -> None:
        """Returns once core and worker answered.

        Raises:
            EngineDeadError: they are gone.
        """

    async def kill(self, *, is_hung: bool = False) -> None:
        """Ends its processes; whoever waits for an answer gets an `EngineDeadError`."""


Start = Callable[[bool], Awaitable[MortalEngine]]
"""Starts an engine that is ready to answer, with the adapters of now. True: others are served
meanwhile, so the event loop must go on."""
Follow = Callable[[MortalEngine], Awaitable[None]]
"""Keeps an engine's adapters up to date, for ever."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an engine counts as hung, and when it is given up.

    Attributes:
        hang_timeout_s: longest time without an answer to a ping.
        max_restarts: starts in a row, each within a minute of the last.
    """

    hang_timeout_s: float
    max_restarts: int


async def until_lost(
    engine: MortalEngine, hang_timeout_s: float, doubted: asyncio.Event | None = None
) -> Reason:
    """Waits until an engine is dead or hung.

    Args:
        engine: to watch.
        hang_timeout_s: longest time without an answer to a ping.
        doubted: set by who has reason to believe that it is gone; it is looked at at once.
    """
    doubted = doubted or asyncio.Event()
    pinging = asyncio.create_task(_until_silent(engine, hang_timeout_s))
    try:
        while not pinging.done():
            try:
                await engine.check_health()
            except EngineDeadError:
                return "died"
            waiting = asyncio.create_task(doubted.wait())
            try:
                await asyncio.wait(
                    {pinging, waiting}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                waiting.cancel()
            doubted.clear()
        return pinging.result()
    finally:
        pinging.cancel()


async def _until_silent(engine: MortalEngine, hang_timeout_s: float) -> Reason:
    while True:
        ping = asyncio.ensure_future(engine.ping())
        try:
            is_answered = await _in_own_time(ping, hang_timeout_s)
            if not is_answered:
                return "hung"
            await ping
        except Exception as error:
            logger.error("the engine does not answer a ping: %s", error)
            return "died"
        finally:
            ping.cancel()
        await asyncio.sleep(PING_S)


async def _in_own_time(task: asyncio.Future[None], seconds: float) -> bool:
    """Waits for a task so many seconds; time in which this process did not run does not count."""
    left = seconds
    while left > 0 and not task.done():
        step = min(left, _SLICE_S)
        await asyncio.wait({task}, timeout=step)
        left -= step
    return task.done()


@dataclass(eq=False)
class _Life:
    """One engine's time: who is in it, and what ended it."""

    engine: MortalEngine
    began: float = field(default_factory=time.monotonic)
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    num_inside: int = 0
    left: Pulse = field(default_factory=Pulse)

    async def is_lost(self) -> bool:
        """Whether it ended, as far as can be known in a moment."""
        self.doubted.set()
        try:
            async with asyncio.timeout(2 * LOOK_S):
                await self.lost.wait()
        except TimeoutError:
            return False
        return True


class WatchedEngine:
    """An `Engine` that is another one, and then the next, each started when the last is lost.

    What was in an engine when it was lost gets `engine_restarting` with `Retry-After`, and so does
    what comes until the next one is ready. A request that engines fail or hang on twice is refused.

    Args:
        start: starts an engine.
        limits: of patience.
        metrics: counts restarts.
        follow: keeps an engine's adapters up to date.
    """

    def __init__(
        self,
        start: Start,
        limits: Limits,
        metrics: EngineMetrics | None = None,
        follow: Follow | None = None,
    ) -> None:
        self._start, self._limits, self._metrics = start, limits, metrics
        self._follow = follow
        self._suspects = Suspects(strikes_alone=1)
        self._life: _Life | None = None
        self._following: asyncio.Future[None] | None = None
        self._in_a_row = 0
        self._start_s = 0.0
        self._ready_at = 0.0
        self.watching: asyncio.Task[None]

    @classmethod
    async def started(
        cls,
        start: Start,
        limits: Limits,
        metrics: EngineMetrics | None = None,
        follow: Follow | None = None,
    ) -> WatchedEngine:
        """Started and watched; `watching` ends only by an `EngineLostError`.

        Raises:
            SieveError: the first start failed.
        """
        watched = cls(start, limits, metrics, follow)
        await watched._begin(is_again=False)
        watched.watching = asyncio.create_task(watched._watch())
        return watched

    @property
    def engine(self) -> MortalEngine:
        """The engine of now.

        Raises:
            EngineRestartingError: there is none.
        """
        if self._life is None or self._life.lost.is_set():
            raise self._restarting()
        return self._life.engine

    @property
    def info(self) -> EngineInfo:
        """Facts of the checkpoint."""
        return self._info

    async def generate(self, request: Generation) -> Generated:
        """Decodes one answer."""
        async with self._suspects.turn(request), self._inside(request) as engine:
            return await engine.generate(request)

    async def explain(self, request: Generation) -> list[Explanation]:
        """Which patches the request's images keep."""
        async with self._suspects.turn(request), self._inside(request) as engine:
            return await engine.explain(request)

    async def chat(self, call: ChatCall) -> dict[str, Any] | AsyncIterator[str]:
        """Answers a chat; a stream whose engine is lost ends with an error event."""
        async with self._suspects.turn(call), AsyncExitStack() as held:
            engine = await held.enter_async_context(self._inside(call))
            answer = await engine.chat(call)
            if isinstance(answer, dict):
                return answer
            return _ended_by_error(answer, held.pop_all())

    async def tower_images(self) -> int:
        """Images that went through the tower of this engine."""
        async with self._inside(None) as engine:
            return await engine.tower_images()

    async def check_health(self) -> None:
        """Raises `EngineRestartingError` while no engine answers."""
        await self.engine.check_health()

    def check_up(self) -> None:
        """Raises `EngineRestartingError` while no engine answers; asks nobody."""
        _ = self.engine

    async def close(self) -> None:
        """Stops watching, then the engine."""
        self.watching.cancel()
        await asyncio.gather(self.watching, return_exceptions=True)
        await self._stop_following()
        if self._life is not None:
            await self._life.engine.close()
            self._life = None

    @asynccontextmanager
    async def _inside(self, request: Generation | ChatCall | None) -> AsyncIterator[MortalEngine]:
        """A call's time in the engine; its loss is told as what it is.

        Raises:
            EngineRestartingError: there is no engine, or it was lost.
            BadRequestError: engines are lost on this request.
        """
        engine, life = self.engine, self._life
        assert life is not None
        life.num_inside += 1
        try:
            yield engine
        except EngineDeadError as error:
            raise await self._told(life, request, error) from error
        except SieveError:
            raise
        except Exception as error:  # what vLLM stumbles over when its engine goes
            if not life.lost.is_set():
                raise
            raise self._restarting() from error
        finally:
            life.num_inside -= 1
            life.left.beat()

    async def _told(
        self, life: _Life, request: Generation | ChatCall | None, error: EngineDeadError
    ) -> SieveError:
        """What a client hears whose request was in an engine that failed it."""
        if not await life.is_lost():
            return error
        if request is not None and error.is_crash:
            told = self._suspects.add(request, error)
            if not isinstance(told, EngineDeadError):
                return told
        return self._restarting()

    def _restarting(self) -> EngineRestartingError:
        error = EngineRestartingError("the engine is being started again; try again shortly")
        error.retry_after_s = max(1, math.ceil(self._ready_at - time.monotonic()))
        return error

    async def _watch(self) -> None:
        while True:
            life = self._life
            assert life is not None
            reason = await until_lost(life.engine, self._limits.hang_timeout_s, life.doubted)
            await self._replace(life, reason)

    async def _replace(self, life: _Life, reason: Reason) -> None:
        lived_s = time.monotonic() - life.began
        if lived_s >= STABLE_S:
            self._in_a_row = 0
        self._ready_at = time.monotonic() + self._start_s + self._backoff_s
        life.lost.set()
        logger.error(
            "the engine %s after %.0f s; it is started again with its adapters", reason, lived_s
        )
        if self._metrics:
            self._metrics.lost(reason)
        await self._stop_following()
        await self._bury(life, is_hung=reason == "hung")
        self._life = None
        while not await self._begun_again():
            pass

    async def _bury(self, life: _Life, *, is_hung: bool) -> None:
        await life.engine.kill(is_hung=is_hung)
        if not await life.left.until(lambda: life.num_inside == 0, _LAST_WORDS_S):
            logger.error("%d requests did not leave the lost engine", life.num_inside)
        await life.engine.close()

    async def _begun_again(self) -> bool:
        """One try to start an engine; whether it is up.

        Raises:
            EngineLostError: there were too many in a row.
        """
        if self._in_a_row >= self._limits.max_restarts:
            raise EngineLostError(
                f"the engine was lost {self._in_a_row + 1} times in a row, allowed are "
                f"{self._limits.max_restarts} restarts (--max-restarts), each within "
                f"{STABLE_S:.0f} s of the last; the server ends. Its log says why: often too "
                "little memory (a kernel that kills processes logs it)"
            )
        wait_s = self._backoff_s
        self._in_a_row += 1
        self._ready_at = time.monotonic() + wait_s + self._start_s
        await asyncio.sleep(wait_s)
        try:
            await self._begin(is_again=True)
        except Exception:
            logger.exception("the engine did not start (try %d)", self._in_a_row)
            return False
        logger.warning("the engine is up again after %.0f s", self._start_s)
        return True

    @property
    def _backoff_s(self) -> float:
        """Wait before the next start: none before the first in a row, then 1, 2, 4 ... s."""
        return min(_MOST_BACKOFF_S, 2.0 ** (self._in_a_row - 1)) if self._in_a_row else 0.0

    async def _begin(self, *, is_again: bool) -> None:
        began = time.monotonic()
        engine = await self._start(is_again)
        self._start_s = time.monotonic() - began
        self._info = engine.info
        if self._follow is not None:
            self._following = asyncio.ensure_future(self._follow(engine))
        self._life = _Life(engine)
        if self._metrics:
            self._metrics.up.set(1)

    async def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            self._following = None


async def _ended_by_error(events: AsyncIterator[str], held: AsyncExitStack) -> AsyncIterator[str]:
    """A stream that holds on to its engine; what goes wrong in it is its last event."""
    try:
        async with held, aclosing(events):  # type: ignore[type-var]  # vLLM's are generators
            async for event in events:
                yield event
    except SieveError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"
