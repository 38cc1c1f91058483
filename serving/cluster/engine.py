"""The engine as an HTTP side on Ray sees it: a handle to replicas, and what to do when one is lost.

A request whose replica or engine was killed from outside is sent to another one: labels and chats
change nothing, so answering twice does no harm. A request that was in an engine which failed by
itself may be what it failed of: see `serving.suspects`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from serving.errors import EngineDeadError, OverloadedError, SieveError
from serving.metrics import Metrics
from serving.protocol import ChatCall, EngineInfo, Explanation, Generated, Generation
from serving.suspects import Suspects

logger = logging.getLogger("sieve")
T = TypeVar("T")

MAX_LOST = 3
"""A request that lost so many engines is given up."""

_REPLICA_LOST = (RayActorError, ActorUnavailableError, ReplicaUnavailableError)
_PAUSE_S = 0.1


class RayEngine:
    """An `Engine` whose model is in replicas.

    Args:
        handle: of `serving.cluster.replica.EngineReplica`.
        info: facts of the checkpoint.
        metrics: counts retries.
    """

    def __init__(self, handle: DeploymentHandle, info: EngineInfo, metrics: Metrics) -> None:
        self._handle, self._info, self._metrics = handle, info, metrics
        self._suspects = Suspects()

    @property
    def info(self) -> EngineInfo:
        """Facts of the checkpoint."""
        return self._info

    async def generate(self, request: Generation) -> Generated:
        """Decodes one answer, on another engine if one is lost."""
        handle = self._handle_for(request)

        async def send() -> Generated:
            return await answered(handle.generate.remote(request, time.time()))

        return await self._persistently(request, send)

    async def explain(self, request: Generation) -> list[Explanation]:
        """Which patches the request's images keep, on another engine if one is lost."""
        handle = self._handle_for(request)

        async def send() -> list[Explanation]:
            return await answered(handle.explain.remote(request, time.time()))

        return await self._persistently(request, send)

    async def chat(self, call: ChatCall) -> dict[str, Any] | AsyncIterator[str]:
        """Answers a chat; a stream is sent to another engine only before its first event."""
        handle = self._handle_for(call)

        async def send() -> dict[str, Any]:
            return await answered(handle.chat.remote(call, time.time()))

        async def open_stream() -> AsyncIterator[str]:
            stream = handle.options(stream=True).chat_stream.remote(call, time.time())
            return await opened(stream, lambda error: self._suspects.add(call, error))

        if call.body.get("stream"):
            return await self._persistently(call, open_stream)
        return await self._persistently(call, send)

    def _handle_for(self, request: Generation | ChatCall) -> DeploymentHandle:
        key = request.adapter.key if request.adapter else ""
        return self._handle.options(multiplexed_model_id=key)

    async def _persistently(
        self, request: Generation | ChatCall, send: Callable[[], Awaitable[T]]
    ) -> T:
        """Sends a request until an engine has answered it, as long as that is safe."""
        async with self._suspects.turn(request):
            return await self._repeatedly(request, send)

    async def _repeatedly(
        self, request: Generation | ChatCall, send: Callable[[], Awaitable[T]]
    ) -> T:
        for num_lost in range(1, MAX_LOST + 1):
            try:
                return await send()
            except EngineDeadError as error:
                if error.is_crash:
                    raise self._suspects.add(request, error) from error
                reason = "engine_killed"
            except _REPLICA_LOST as error:
                logger.warning("request %s lost its replica: %r", request.request_id, error)
                reason = "replica_died"
            except BackPressureError as error:
                raise _overloaded(error) from error
            except DeploymentUnavailableError as error:
                raise EngineDeadError("no engine can be started; see the server's log") from error
            if num_lost < MAX_LOST:
                self._metrics.retries.labels(reason).inc()
                await asyncio.sleep(_PAUSE_S * num_lost)
        raise EngineDeadError(f"{MAX_LOST} engines were lost with this request; try again shortly")

    async def tower_images(self) -> int:
        """Counted by the coordinator."""
        raise NotImplementedError

    async def check_health(self) -> None:
        """Raises `EngineDeadError` where no engine answers soon."""
        try:
            await asyncio.wait_for(answered(self._handle.info.remote()), 5.0)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            raise EngineDeadError("no engine answers; try again shortly") from error

    async def close(self) -> None:
        """Engines end with the application."""


def _overloaded(error: BackPressureError) -> OverloadedError:
    refusal = OverloadedError(
        f"{error.args[0]} requests wait for an engine, allowed are {error.args[1]}; try again "
        "shortly"
    )
    refusal.status, refusal.retry_after_s = 429, max(1, round(error.retry_after_s or 1))
    return refusal


async def answered(response: Any) -> Any:
    """What a replica answered; its errors raised, its work stopped if the caller stops.

    Raises:
        SieveError: the replica returned it.
    """
    try:
        answer = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    if isinstance(answer, SieveError):
        raise answer
    return answer


async def opened(
    stream: Any, on_crash: Callable[[EngineDeadError], SieveError]
) -> AsyncIterator[str]:
    """A replica's stream after its first item, which says whether it works at all.

    Args:
        stream: of Ray's.
        on_crash: told where the engine fails by itself in the middle; says what the client hears.

    Raises:
        SieveError: the replica's first item.
    """
    events = aiter(stream)
    try:
        first = await anext(events)
    except asyncio.CancelledError:
        stream.cancel()
        raise
    if isinstance(first, SieveError):
        raise first
    return _events(stream, events, on_crash)


async def _events(
    stream: Any,
    events: AsyncIterator[str | SieveError],
    on_crash: Callable[[EngineDeadError], SieveError],
) -> AsyncIterator[str]:
    """A started stream; one whose engine is lost ends with an error event."""
    is_over = False
    try:
        async for event in events:
            if isinstance(event, SieveError):
                raise event
            yield event
        is_over = True
    except (*_REPLICA_LOST, SieveError) as error:
        is_over = True
        lost: SieveError = EngineDeadError("the engine was lost in this answer; ask again")
        if isinstance(error, EngineDeadError) and error.is_crash:
            lost = on_crash(error)
        elif isinstance(error, SieveError) and not isinstance(error, EngineDeadError):
            lost = error
        yield f"data: {json.dumps(lost.body())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        if not is_over:
            stream.cancel()
