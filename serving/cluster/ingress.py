"""The HTTP side on Ray: the same app as in one process, before handles."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from serving.adapter_states import AdapterStatus, Report, Snapshot
from serving.app import build_app
from serving.cluster.engine import RayEngine
from serving.cluster.settings import RayAppSettings
from serving.draining import Drain
from serving.errors import OverloadedError, SieveError
from serving.facts import engine_info
from serving.following import Bulletin, follow_with_bulletin
from serving.image_workers import image_decoder
from serving.labeler import Labeler
from serving.logs import configure_logs
from serving.metrics import Metrics
from serving.server import catalogue_of, load_tokenizer

logger = logging.getLogger("sieve")
_PUSH_S = 1.0


class Ingress:
    """App, labeler and a handle to the engines; it needs none of them to be up.

    Args:
        settings: of the application.
        engines: handle of the engine deployment.
        coordinator: handle of the coordinator.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: RayAppSettings, engines: DeploymentHandle, coordinator: DeploymentHandle
    ) -> None:
        configure_logs(settings)
        self._coordinator = coordinator
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._drain = Drain(settings.drain_s)
        catalogue = catalogue_of(settings)
        bulletin = Bulletin(catalogue)
        bulletin.update(await self._follow(Report(member=f"start-{self._name}", kind="start")))
        engine = RayEngine(engines, engine_info(settings), self._metrics)
        labeler = Labeler(engine, catalogue, load_tokenizer(settings.model))
        self._images = AsyncExitStack()  # its processes end with this one
        decoder = await self._images.enter_async_context(image_decoder(settings, self._metrics))
        await decoder.started()
        self._http = build_app(
            labeler,
            settings,
            self._metrics,
            bulletin=bulletin,
            adapters=RemoteRegistry(coordinator),
            scrape=self._scrape,
            is_behind_proxy=True,
            drain=self._drain,
            decoder=decoder,
        )
        self._tasks = [
            asyncio.create_task(self._drain_when_told()),
            asyncio.create_task(follow_with_bulletin(self._follow, bulletin)),
            asyncio.create_task(self._push()),
        ]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve asks for once this is set up."""
        return self._http

    async def _follow(self, report: Report) -> Snapshot:
        snapshot: Snapshot = await self._coordinator.follow.remote(report)
        return snapshot

    async def _scrape(self) -> bytes:
        await self._coordinator.push.remote("Ingress", self._name, self._metrics.render())
        text: bytes = await self._coordinator.scrape.remote()
        return text

    async def _drain_when_told(self) -> None:
        """Lets nobody in once the application ends, and tells when all inside are answered."""
        is_told = False
        while not is_told:
            try:
                is_told = await self._coordinator.draining.remote(self._name)
            except Exception as error:  # the coordinator restarts
                logger.debug("coordinator out of reach: %r", error)
                await asyncio.sleep(_PUSH_S)
        await self._drain.run()
        await self._coordinator.drained.remote(self._name)

    async def _push(self) -> None:
        while True:
            await asyncio.sleep(_PUSH_S)
            try:
                await self._coordinator.push.remote("Ingress", self._name, self._metrics.render())
            except Exception as error:  # the coordinator restarts: the next push will do
                logger.debug("metrics not sent: %r", error)


class RemoteRegistry:
    """The registry in the coordinator, for `POST` and `DELETE /v1/adapters`.

    Args:
        coordinator: its handle.
    """

    def __init__(self, coordinator: DeploymentHandle) -> None:
        self._coordinator = coordinator

    async def add(
        self, name: str, version: str | None = None, *, pin: bool | None = None
    ) -> AdapterStatus:
        """Serves an adapter of the folder."""
        return await self._asked(self._coordinator.add.remote(name, version, pin))

    async def remove(self, name: str) -> AdapterStatus:
        """Stops serving one."""
        return await self._asked(self._coordinator.remove.remote(name))

    async def _asked(self, response: Any) -> AdapterStatus:
        try:
            status: AdapterStatus | SieveError = await response
        except RayError as error:
            raise OverloadedError("the adapter registry restarts; try again shortly") from error
        if isinstance(status, SieveError):
            raise status
        return status
