"""The one place that all replicas agree through: adapters, and metrics in one scrape.

No request passes it. While it is gone, ingresses serve what they knew last.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest
from ray.serve._private.constants import SERVE_NAMESPACE

from serving.adapter_states import AdapterStatus, Report, Snapshot
from serving.adapters import lora_room
from serving.cluster.board import Board
from serving.cluster.decisions import ACTOR_NAME, DecisionLog
from serving.cluster.exits import Exits
from serving.cluster.settings import RayAppSettings
from serving.errors import SieveError
from serving.metrics import ClusterMetrics, Metrics
from serving.protocol import LoraRoom
from serving.server import catalogue_of, describe_adapters, open_registry
from serving.watchdog import Reason


class Coordinator:
    """Adapter registry and metrics board of the application.

    Args:
        settings: of the application.
    """

    async def __init__(self, settings: RayAppSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._registry = await open_registry(settings, catalogue_of(settings))
        print(describe_adapters(self._registry))
        served = self._registry.snapshot().served.values()
        self._room = lora_room(settings, [installed.adapter for installed in served])
        self._least_replicas = settings.least_replicas
        self._board = Board()
        self._tower_images: dict[str, int] = {}
        self._lost: Counter[Reason] = Counter()
        self._exits = Exits()
        self._log = (
            ray.remote(DecisionLog)
            .options(
                name=ACTOR_NAME,
                namespace=SERVE_NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
            )
            .remote()
        )

    async def room(self) -> LoraRoom | None:
        """Room for adapters of every engine."""
        return self._room

    async def follow(self, report: Report) -> Snapshot:
        """The registry's news for a follower; see `Registry.follow`."""
        if report.kind == "start":
            return self._registry.snapshot()
        return await self._registry.follow(report)

    async def add(
        self, name: str, version: str | None, pin: bool | None
    ) -> AdapterStatus | SieveError:
        """Serves an adapter; what is wrong with it comes back as a value."""
        try:
            return await self._registry.add(name, version, pin=pin)
        except SieveError as error:
            return error

    async def remove(self, name: str) -> AdapterStatus | SieveError:
        """Stops serving one."""
        try:
            return await self._registry.remove(name)
        except SieveError as error:
            return error

    async def push(self, deployment: str, replica: str, text: bytes) -> None:
        """Takes a replica's metrics."""
        self._board.put(deployment, replica, text)

    async def push_tower_images(self, replica: str, count: int) -> None:
        """Takes how many images went through a replica's tower."""
        self._tower_images[replica] = count

    async def lost(self, reason: Reason) -> None:
        """Takes that a replica lost its engine."""
        self._lost[reason] += 1

    async def draining(self, ingress: str) -> bool:
        """Whether HTTP sides are to let nobody in any more; answers when that changes, or soon."""
        return await self._exits.begun(ingress)

    async def drained(self, ingress: str) -> None:
        """Takes that an HTTP side has answered all that it had accepted."""
        self._exits.done(ingress)

    async def drain(self, limit_s: float) -> bool:
        """Has every HTTP side answer what it accepted and refuse the rest; whether all told so."""
        return await self._exits.all_done(limit_s)

    async def decisions(self) -> list[dict[str, Any]]:
        """The autoscaler's last decisions, oldest first."""
        found: list[dict[str, Any]] = await self._log.read.remote()
        return found

    async def scrape(self) -> bytes:
        """All metrics of the application."""
        own = CollectorRegistry()
        metrics, cluster = Metrics(own), ClusterMetrics(own)
        metrics.set_adapters(self._registry.statuses())
        metrics.tower_images.set(sum(self._tower_images.values()))
        for lost, number in self._lost.items():
            cluster.restarts.labels(lost).inc(number)
        for reason, count in (await self._log.counts.remote()).items():
            cluster.decisions.labels(reason).inc(count)
        load = await self._log.load.remote()
        cluster.visual_tokens.set(load.get("visual_tokens", 0.0))
        cluster.queue_wait.set(load.get("queue_wait_s", 0.0))
        running = load.get("running", self._registry.num_engines)
        cluster.replicas.labels("running").set(running)
        cluster.replicas.labels("target").set(load.get("target", self._least_replicas))
        self._board.put("Coordinator", "coordinator", generate_latest(own))
        return self._board.render()
