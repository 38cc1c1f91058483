"""The whole HTTP side in this process, before an engine that answers at once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from bench.stub_engine import SERVICE_MS, StubEngine
from serving.adapters import InstalledAdapter
from serving.app import build_app
from serving.errors import AdapterError
from serving.following import Bulletin
from serving.labeler import Labeler
from serving.metrics import Metrics
from serving.registry import Registry
from serving.server import catalogue_of, load_tokenizer
from serving.settings import Settings


def _no_adapter(
    folder: Path, name: str, others: Mapping[str, InstalledAdapter]
) -> InstalledAdapter:
    raise AdapterError(f"adapter {name!r}: there is no folder with adapters")


@asynccontextmanager
async def stub_app(settings: Settings) -> AsyncIterator[FastAPI]:
    """The app of these settings, with the demo's tokenizer and no adapters."""
    os.environ[SERVICE_MS] = "0"
    engine = await StubEngine.start(settings)
    catalogue = catalogue_of(settings)
    labeler = Labeler(engine, catalogue, load_tokenizer(settings.model))
    try:
        yield build_app(
            labeler,
            settings,
            Metrics(CollectorRegistry()),
            bulletin=Bulletin(catalogue),
            adapters=Registry(None, check=_no_adapter),
        )
    finally:
        await engine.close()
