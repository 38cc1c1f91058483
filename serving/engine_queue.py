"""What waits in an engine, in tokens, and when to come again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from serving.errors import FailedOnceError, OverloadedError
from serving.pace import Pace, retry_after

T = TypeVar("T")
_LOOK_AGAIN_S = 0.05


class EngineQueue:
    """The prompt tokens of an engine that were accepted and not yet read, and how fast it reads.

    Visual tokens count as they are kept: a request at retention 0.2 takes a third of the room of
    one at 1.0. VLLM counts and refuses; here its refusal becomes one that says when to come again.
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._is_busy = False
        self.num_tokens: Callable[[], int] = lambda: 0

    def stat_logger(self, vllm_config: Any, engine_index: int = 0) -> EngineQueue:
        """A factory of what vLLM calls a logger of statistics: it is told of every step."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """One step of the engine."""
        done = iteration_stats.num_prompt_tokens if iteration_stats is not None else 0
        self._pace.tick(was_busy=self._is_busy, done=done)
        if scheduler_stats is not None:
            self._is_busy = scheduler_stats.num_running_reqs + scheduler_stats.num_waiting_reqs > 0

    def log_engine_initialized(self) -> None:
        """Of no interest here."""

    def log(self) -> None:
        """Of no interest here."""

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """Of no interest here."""

    def refusal(self) -> OverloadedError:
        """For a request that found it full; `Retry-After` is when what waits now will be read."""
        waiting = self.num_tokens()
        error = OverloadedError(
            f"{waiting} prompt tokens wait in the engine, which is its limit; try again in the "
            "seconds that Retry-After says, or with a lower retention_ratio"
        )
        error.retry_after_s = retry_after(self._pace.seconds_for(waiting) or 1)
        return error


async def persistently(ask: Callable[[], Awaitable[T]], *, waits: bool) -> T:
    """Asks an engine; once more where it failed on this request alone and goes on.

    Args:
        ask: asks it.
        waits: a full queue is waited for. A further pass of a request that was let in does: being
            refused now, it would have cost its first pass for nothing.
    """
    has_failed = False
    while True:
        try:
            return await ask()
        except FailedOnceError:
            if has_failed:
                raise
            has_failed = True
        except OverloadedError:
            if not waits:
                raise
            await asyncio.sleep(_LOOK_AGAIN_S)
