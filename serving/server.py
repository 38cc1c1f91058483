"""A server from its settings: checks, engine, app, in that order; everything stops with it."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from prometheus_client import REGISTRY, CollectorRegistry
from transformers import AutoConfig, AutoProcessor

from patches.config import check_checkpoint
from serving.adapter_files import AdapterFolder
from serving.adapter_states import State
from serving.adapters import InstalledAdapter, check_adapter, lora_room, read_base
from serving.app import build_app
from serving.catalogue import Catalogue, Choices
from serving.connections import connection_class
from serving.draining import Drain
from serving.errors import ConfigError, EngineDeadError
from serving.following import Bulletin, follow_with_bulletin, follow_with_engine
from serving.image_workers import image_decoder
from serving.keys import describe_access
from serving.labeler import Labeler
from serving.logs import configure_logs
from serving.metrics import EngineMetrics, Metrics
from serving.protocol import Adapter, Engine
from serving.registry import Registry
from serving.settings import Settings
from serving.structures import STRUCTURES, LabelStructure, load_structures
from serving.watchdog import Follow, Limits, MortalEngine, Start, WatchedEngine

Report = Callable[[str], None]
_SCRAPE_S = 2.0
_GOODBYE_S = 5
"""For connections to close once everything is answered."""


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer with its chat template (LLaVA keeps that with the processor)."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return tokenizer


def check_model(model: str) -> None:
    """Refuses what cannot be served before half a minute is spent on loading it.

    Raises:
        ConfigError: there is no such checkpoint, or it is not LLaVA-1.5-like.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={model!r} cannot be read: {error}", param="model") from error
    if config.model_type != "llava":
        raise ConfigError(
            f"model={model!r} is a {config.model_type!r} model; a LLaVA-1.5 checkpoint in Hugging "
            "Face's format is needed, e.g. llava-hf/llava-1.5-7b-hf",
            param="model",
        )
    try:
        check_checkpoint(config)
    except ValueError as error:
        raise ConfigError(f"model={model!r}: {error}", param="model") from error


def catalogue_of(
    settings: Settings, adapters: Mapping[str, InstalledAdapter] | None = None
) -> Catalogue:
    """Structures of the settings, with these adapters.

    Raises:
        ConfigError: a structure or manifest cannot be used; says why.
    """
    structures: dict[str, LabelStructure] = dict(STRUCTURES)
    if settings.structures is not None:
        structures |= load_structures(settings.structures)
    return Catalogue(
        base=settings.served_name,
        adapters=adapters,
        structures=structures,
        structure=settings.label_structure,
        retention=settings.sieve.retention,
    )


async def open_registry(settings: Settings, catalogue: Catalogue) -> Registry:
    """The registry of the settings' adapters folder, which was looked through.

    Raises:
        AdapterError: there is no such folder.
    """
    base = read_base(settings.model)

    def check(folder: Path, name: str, others: Mapping[str, InstalledAdapter]) -> InstalledAdapter:
        installed = check_adapter(folder, base, name)
        catalogue.check(name, installed.manifest, others)
        return installed

    url = settings.adapters_folder
    room = lora_room(settings, [])
    registry = Registry(
        await asyncio.to_thread(AdapterFolder, url) if url is not None else None,
        check,
        max_pinned=room.max_loras - 1 if room else 0,
    )
    await registry.discover()
    return registry


def describe_adapters(registry: Registry) -> str:
    """A line for the operator: what is served, what is refused and why."""
    statuses = registry.statuses()
    served = sorted(registry.snapshot().served)
    shown = ", ".join(served[:8]) + (f" and {len(served) - 8} more" if len(served) > 8 else "")
    refused = [f"\n  refused: {s.reason}" for s in statuses if s.state is State.REFUSED]
    return f"adapters: {shown or 'none'}{''.join(refused)}"


@asynccontextmanager
async def running_labeler(
    settings: Settings,
    report: Report = print,
    catalogue: Catalogue | None = None,
    registry: Registry | None = None,
    metrics: EngineMetrics | None = None,
    *,
    is_watched: bool = False,
) -> AsyncIterator[Labeler]:
    """A labeler on an engine in this process; the engine ends with the block.

    Args:
        settings: of engine and models.
        report: gets a line a step.
        catalogue: what may be asked for; by default what the settings say.
        registry: adapters come and go as it says; by default they stay as they are.
        metrics: of the engine.
        is_watched: whether an engine that is lost is started again.
    """
    started = time.perf_counter()
    check_model(settings.model)
    catalogue = catalogue or catalogue_of(settings)
    if registry is None and not catalogue.adapters:
        registry = await open_registry(settings, catalogue)
    if registry is not None:
        catalogue.update(registry.snapshot().served)
        report(describe_adapters(registry))
    report(f"loading {Path(settings.model).name} (half a minute on a small machine) ...")
    tokenizer = load_tokenizer(settings.model)
    if not is_watched:  # work of one's own waits; it is not refused
        settings = settings.model_copy(update={"max_queued_tokens": 0})
    start, follow = _starter(settings, catalogue, tokenizer, metrics), _follower(registry)
    running = _watched if is_watched else _unwatched
    async with running(settings, start, follow, metrics) as engine:
        report(f"ready in {time.perf_counter() - started:.0f} s")
        yield Labeler(engine, catalogue, tokenizer)


def _starter(
    settings: Settings, catalogue: Catalogue, tokenizer: Any, metrics: EngineMetrics | None
) -> Start:
    """What starts an engine, the first and any later one: each has the room that the first had."""
    from serving.engine import VllmEngine

    def served() -> list[Adapter]:
        return [installed.adapter for installed in catalogue.adapters.values()]

    room = lora_room(settings, served())

    async def start(is_again: bool) -> MortalEngine:
        engine = await VllmEngine.start(
            settings, served(), room=room, metrics=metrics, is_again=is_again
        )
        try:
            await warm_up(Labeler(engine, catalogue, tokenizer))
        except BaseException:
            await engine.close()
            raise
        return engine

    return start


def _follower(registry: Registry | None) -> Follow | None:
    if registry is None:
        return None
    return lambda engine: follow_with_engine(registry.follow, engine.adapters)


@asynccontextmanager
async def _watched(
    settings: Settings, start: Start, follow: Follow | None, metrics: EngineMetrics | None
) -> AsyncIterator[Engine]:
    limits = Limits(hang_timeout_s=settings.hang_timeout_s, max_restarts=settings.max_restarts)
    engine = await WatchedEngine.started(start, limits, metrics, follow)
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def _unwatched(
    settings: Settings, start: Start, follow: Follow | None, metrics: EngineMetrics | None
) -> AsyncIterator[Engine]:
    engine = await start(False)
    following = asyncio.ensure_future(follow(engine)) if follow else None
    try:
        yield engine
    finally:
        if following:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await engine.close()


async def warm_up(labeler: Labeler) -> None:
    """One answer a structure with an image: the first client waits for nothing to compile."""
    for name in labeler.constraints:
        await labeler.label("", [Image.new("RGB", (8, 8))], Choices(label_structure=name))


@asynccontextmanager
async def running_app(
    settings: Settings,
    report: Report = print,
    metrics_registry: CollectorRegistry = REGISTRY,
    drain: Drain | None = None,
) -> AsyncIterator[tuple[FastAPI, Labeler]]:
    """The HTTP app before an engine in this process, its adapters following their registry."""
    metrics = Metrics(metrics_registry)
    catalogue = catalogue_of(settings)
    check_model(settings.model)
    registry = await open_registry(settings, catalogue)
    bulletin = Bulletin(catalogue)
    engine_metrics = EngineMetrics(metrics_registry)
    async with (
        image_decoder(settings, metrics) as decoder,
        running_labeler(
            settings, report, catalogue, registry, engine_metrics, is_watched=True
        ) as labeler,
    ):
        engine = labeler.engine
        assert isinstance(engine, WatchedEngine)
        await decoder.started()

        async def scrape() -> bytes:
            with suppress(EngineDeadError, TimeoutError):  # it is silent: the last count stays
                async with asyncio.timeout(_SCRAPE_S):
                    metrics.tower_images.set(await engine.tower_images())
            metrics.set_adapters(registry.statuses())
            return metrics.render()

        following = asyncio.create_task(follow_with_bulletin(registry.follow, bulletin))
        try:
            yield (
                build_app(
                    labeler,
                    settings,
                    metrics,
                    bulletin=bulletin,
                    adapters=registry,
                    scrape=scrape,
                    drain=drain,
                    check_up=engine.check_up,
                    decoder=decoder,
                ),
                labeler,
            )
        finally:
            following.cancel()


async def serve(settings: Settings) -> None:
    """Runs until SIGINT or SIGTERM, and then until what was accepted is answered.

    Raises:
        EngineLostError: the engine does not stay up.
    """
    logging.basicConfig(level=settings.log_level.upper())
    configure_logs(settings)
    report: Report = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if access := describe_access(settings.keys, settings.host):
        report(access)
    drain = Drain(settings.drain_s)
    async with running_app(settings, report, drain=drain) as (app, labeler):
        config = http_config(app, settings, timeout_graceful_shutdown=_GOODBYE_S)
        server = QuietServer(config, drain)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started:
            report(f"serving {settings.served_name} on http://{settings.host}:{settings.port}")
        assert isinstance(labeler.engine, WatchedEngine)
        watching = labeler.engine.watching
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            server.stop_once()
        await task
        report("stopping")
        if watching.done():
            watching.result()


def http_config(app: FastAPI, settings: Settings, **more: Any) -> uvicorn.Config:
    """How the server in one process speaks HTTP: no websockets, slow clients lose their place."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,  # ours has no query, in which a key may stand by mistake
        lifespan="off",
        http=connection_class(settings.client_timeout_s),
        # Longer than clients keep idle connections (httpx, so OpenAI's: 5 s, Uvicorn's default):
        # who closes first while the other sends breaks a request.
        timeout_keep_alive=math.ceil(settings.client_timeout_s),
        ws="none",
        **more,
    )


class QuietServer(uvicorn.Server):
    """Uvicorn that leaves signals to us; its own way ends the process before the engine is.

    Args:
        config: of the server.
        drain: whose end is this server's.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    def stop(self) -> None:
        """Answers what was accepted, then ends; at once the second time."""
        if self._ending is None:
            self.stop_once()
        else:
            self._drain.cut()
            self.force_exit = self.should_exit = True

    def stop_once(self) -> None:
        """Answers what was accepted, then ends, however often it is asked."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        await self._drain.run()
        self.should_exit = True
