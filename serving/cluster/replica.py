"""One engine as a Ray Serve replica.

It ends as soon as its engine does or hangs, and Serve starts another. Requests that come in between
wait for that end and are then sent to another replica: a dead engine would refuse, and so be
chosen, faster than the living ones, and a request that came after a crash is not to blame for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from patches.config import Retention
from serving.adapter_states import Report, Snapshot
from serving.cluster.settings import RayAppSettings
from serving.errors import EngineDeadError, SieveError
from serving.following import follow_with_engine
from serving.labeler import Labeler
from serving.metrics import EngineMetrics
from serving.protocol import ChatCall, EngineInfo, Explanation, Generated, Generation
from serving.server import catalogue_of, load_tokenizer, warm_up
from serving.watchdog import until_lost

logger = logging.getLogger("sieve.engine")

PUSH_S = 1.0
WAIT_WINDOW_S = 5.0
_LAST_WORDS_S = 5.0
_SENDING_S = 0.2


class EngineReplica:
    """An engine and what Serve asks of it.

    Errors of a request come back as values: Ray wraps those that are raised.

    Args:
        settings: of the application.
        coordinator: handle of `serving.cluster.coordinator.Coordinator`.
        engine_class: `module:Class` of an engine with `VllmEngine.start`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: RayAppSettings, coordinator: DeploymentHandle, engine_class: str
    ) -> None:
        self._coordinator = coordinator
        self._work = Work()
        self._is_ending = False
        self._doubted = asyncio.Event()
        self._metrics = EngineMetrics()
        self._name = serve.get_replica_context().replica_id.unique_id
        room = await coordinator.room.remote()
        snapshot = await self._follow(Report(member=f"start-{self._name}", kind="start"))
        adapters = [installed.adapter for installed in snapshot.served.values()]
        module, _, name = engine_class.partition(":")
        engine_type = getattr(import_module(module), name)
        self._engine = await engine_type.start(settings, adapters, room=room, metrics=self._metrics)
        catalogue = catalogue_of(settings)
        await warm_up(Labeler(self._engine, catalogue, load_tokenizer(settings.model)))
        self._metrics.up.set(1)
        self._resident: frozenset[str] = frozenset()
        self._tasks = [
            asyncio.create_task(follow_with_engine(self._follow, self._engine.adapters)),
            asyncio.create_task(self._push()),
            asyncio.create_task(self._watch(settings.hang_timeout_s)),
        ]

    async def _follow(self, report: Report) -> Snapshot:
        self._resident = report.held
        snapshot: Snapshot = await self._coordinator.follow.remote(report)
        return snapshot

    async def info(self) -> EngineInfo:
        """Facts of the checkpoint."""
        info: EngineInfo = self._engine.info
        return info

    async def generate(self, request: Generation, sent_at: float) -> Generated | SieveError:
        """Decodes one answer.

        Args:
            request: what to decode.
            sent_at: when it left the ingress, in seconds since the epoch.
        """
        await self._living()
        with self._work.of(request.retention, len(request.images), sent_at, self._engine) as way_s:
            try:
                generated: Generated = await self._engine.generate(request)
            except SieveError as error:
                return self._failed(request.request_id, error)
            seconds = way_s + generated.queue_ms / 1e3
            self._work.waited(seconds)
            self._metrics.queue_wait.observe(seconds)
            return generated

    async def explain(self, request: Generation, sent_at: float) -> list[Explanation] | SieveError:
        """Which patches the request's images keep."""
        await self._living()
        with self._work.of(request.retention, len(request.images), sent_at, self._engine):
            try:
                found: list[Explanation] = await self._engine.explain(request)
            except SieveError as error:
                return self._failed(request.request_id, error)
            return found

    async def chat(self, call: ChatCall, sent_at: float) -> dict[str, Any] | SieveError:
        """Answers a chat in one piece."""
        await self._living()
        with self._work.of(call.retention, call.num_images, sent_at, self._engine):
            try:
                answer: dict[str, Any] = await self._engine.chat(call)
            except SieveError as error:
                return self._failed(call.request_id, error)
            return answer

    async def chat_stream(self, call: ChatCall, sent_at: float) -> AsyncIterator[str | SieveError]:
        """Answers a chat in server-sent events; the first item says whether it works at all."""
        await self._living()
        with self._work.of(call.retention, call.num_images, sent_at, self._engine):
            try:
                events: AsyncIterator[str] = await self._engine.chat(call)
                yield ""
                async for event in events:
                    yield event
            except SieveError as error:
                yield self._failed(call.request_id, error)

    def _failed(self, request_id: str, error: SieveError) -> SieveError:
        logger.info("request %s: %s", request_id, error.message)
        if isinstance(error, EngineDeadError):
            self._doubted.set()
        return error

    async def _living(self) -> None:
        """Returns if the engine lives; else never: the caller hears of the replica's end."""
        try:
            await self._engine.check_health()
        except EngineDeadError:
            self._doubted.set()
            await asyncio.Event().wait()
        if self._is_ending:
            await asyncio.Event().wait()

    async def _exit(self) -> None:
        """Ends this process once those whose request was in the engine have been told."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while self._work.stats()["requests"] and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(_SENDING_S)
        os._exit(1)

    async def _watch(self, hang_timeout_s: float) -> None:
        """Ends the replica with its engine; a stopped worker would outlive both."""
        reason = await until_lost(self._engine, hang_timeout_s, self._doubted)
        self._is_ending = True
        logger.error("the engine of replica %s %s; the replica ends", self._name, reason)
        self._coordinator.lost.remote(reason)  # for the metrics: nobody waits for it
        await self._engine.kill(is_hung=reason == "hung")
        await self._exit()

    async def _push(self) -> None:
        """Sends this process's metrics to where one scrape finds them all."""
        from prometheus_client import generate_latest

        while True:
            await asyncio.sleep(PUSH_S)
            text = await asyncio.to_thread(generate_latest)
            try:
                await self._coordinator.push.remote("Engine", self._name, text)
                images = await self._engine.tower_images()
                await self._coordinator.push_tower_images.remote(self._name, images)
            except Exception as error:  # the coordinator restarts: the next push will do
                logger.debug("metrics not sent: %r", error)

    async def check_health(self) -> None:
        """Serve restarts a replica for which this raises."""
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy reads."""
        return self._work.stats()

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router reads."""
        return {"adapters": sorted(self._resident)}

    async def pids(self) -> dict[str, int]:
        """Processes of this replica, for fault drills."""
        (engine,) = [process.pid for process in self._engine._processes][:1] or [0]
        return {"replica": os.getpid(), "engine": engine}

    async def __del__(self) -> None:
        """Serve ends a replica after its last request."""
        for task in getattr(self, "_tasks", []):
            task.cancel()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


class Work:
    """What an engine has accepted and not yet answered, and how long requests waited for it."""

    def __init__(self) -> None:
        self._tokens, self._requests = 0.0, 0
        self._waits: deque[tuple[float, float]] = deque()

    @contextmanager
    def of(
        self, retention: Retention, num_images: int, sent_at: float, engine: Any
    ) -> Iterator[float]:
        """One request's time here; yields how long its way took, in seconds."""
        tokens = retention.num_kept(engine.info.num_patches) * num_images
        self._tokens += tokens
        self._requests += 1
        # Clocks of two machines: a wait is never negative.
        way_s = max(0.0, time.time() - sent_at)
        self.waited(way_s)
        try:
            yield way_s
        finally:
            self._tokens -= tokens
            self._requests -= 1

    def waited(self, seconds: float) -> None:
        """Notes how long a request waited until the engine took it up."""
        self._waits.append((time.monotonic(), max(seconds, 1e-3)))

    def stats(self) -> dict[str, float]:
        """Load now, and the longest wait of the last seconds."""
        oldest = time.monotonic() - WAIT_WINDOW_S
        while self._waits and self._waits[0][0] < oldest:
            self._waits.popleft()
        return {
            "visual_tokens": float(self._tokens),
            "requests": float(self._requests),
            "queue_wait_s": max((seconds for _, seconds in self._waits), default=0.0),
        }
