"""A server from its settings: checks, engine, app, in that order; everything stops with it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from patches.config import check_checkpoint
from serving.adapters import InstalledAdapter, find_adapters, read_base
from serving.app import build_app
from serving.errors import ConfigError
from serving.images import ImageLimits
from serving.labeler import Catalogue, Choices, Labeler
from serving.metrics import Metrics
from serving.settings import Settings
from serving.structures import STRUCTURES, LabelStructure, load_structures

Report = Callable[[str], None]


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer with its chat template (LLaVA keeps that with the processor)."""
    processor = AutoProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return tokenizer


def check_model(model: str) -> None:
    """Refuses what cannot be served before half a minute is spent on loading it.

    Raises:
        ConfigError: there is no such checkpoint, or it is not LLaVA-1.5-like.
    """
    try:
        config = AutoConfig.from_pretrained(model)
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


def load_catalogue(settings: Settings) -> Catalogue:
    """Structures and adapters of the settings, all checked.

    Raises:
        ConfigError: a structure, manifest or adapter cannot be used; says why.
    """
    adapters: dict[str, InstalledAdapter] = {}
    if settings.adapters_folder is not None:
        adapters = find_adapters(settings.adapters_folder, read_base(settings.model))
    return catalogue_of(settings, adapters)


def catalogue_of(settings: Settings, adapters: Mapping[str, InstalledAdapter]) -> Catalogue:
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


@asynccontextmanager
async def running_labeler(
    settings: Settings, report: Report = print, catalogue: Catalogue | None = None
) -> AsyncIterator[Labeler]:
    """A labeler on an engine in this process; the engine ends with the block.

    Args:
        settings: of engine and models.
        report: gets a line a step.
        catalogue: what may be asked for; by default what the settings say.
    """
    from serving.engine import VllmEngine

    started = time.perf_counter()
    check_model(settings.model)
    catalogue = catalogue or load_catalogue(settings)
    report(f"adapters: {', '.join(catalogue.adapters) or 'none'}")
    report(f"loading {Path(settings.model).name} (half a minute on a small machine) ...")
    adapters = [installed.adapter for installed in catalogue.adapters.values()]
    engine = await VllmEngine.start(settings, adapters)
    try:
        labeler = Labeler(engine, catalogue, load_tokenizer(settings.model))
        await warm_up(labeler)
        report(f"ready in {time.perf_counter() - started:.0f} s")
        yield labeler
    finally:
        await engine.close()


async def warm_up(labeler: Labeler) -> None:
    """One answer a structure with an image: the first client waits for nothing to compile."""
    for name in labeler.constraints:
        await labeler.label("", [Image.new("RGB", (8, 8))], Choices(label_structure=name))


def image_limits(settings: Settings) -> ImageLimits:
    """What is admitted, from the settings."""
    return ImageLimits(
        max_images=settings.max_images,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
    )


def app_for(labeler: Labeler, settings: Settings, metrics: Metrics) -> FastAPI:
    """The HTTP app of a running labeler."""
    return build_app(
        labeler,
        limits=image_limits(settings),
        max_text_chars=settings.max_text_chars,
        metrics=metrics,
    )


async def serve(settings: Settings) -> None:
    """Runs until SIGINT or SIGTERM."""
    logging.basicConfig(level=settings.log_level.upper())
    report: Report = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    async with running_labeler(settings, report) as labeler:
        config = uvicorn.Config(
            app_for(labeler, settings, Metrics()),
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            timeout_graceful_shutdown=30,
            lifespan="off",
        )
        server = QuietServer(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started:
            report(f"serving {settings.served_name} on http://{settings.host}:{settings.port}")
        await task
        report("stopping")


class QuietServer(uvicorn.Server):
    """Uvicorn that leaves signals to us; its own way ends the process before the engine is."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    def stop(self) -> None:
        """Answers what was accepted, then ends; at once the second time."""
        self.force_exit = self.should_exit
        self.should_exit = True
