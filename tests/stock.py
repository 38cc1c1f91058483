"""Stock vLLM LLaVA behind the same labeler: the control at ratio 1.0."""

from __future__ import annotations

from dataclasses import replace

from patches.config import Retention, SieveConfig
from serving.engine import VllmEngine
from serving.labeler import Labeler
from serving.server import catalogue_of, load_tokenizer, open_registry
from serving.settings import Settings
from tests.running import RunningServer


class StockConfig(SieveConfig):
    def hf_overrides(self):
        return {}


class StockRetention(Retention):
    def processor_kwargs(self):
        return {}


class StockSettings(Settings):
    @property
    def sieve(self):
        return StockConfig()


class StockEngine(VllmEngine):
    async def generate(self, request):
        return await super().generate(replace(request, retention=StockRetention()))


class StockServer(RunningServer):
    """No HTTP: `labeler` is all that is asked of it."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.settings = StockSettings(max_num_seqs=16, **settings)

    async def _start(self):
        catalogue = catalogue_of(self.settings)
        registry = await open_registry(self.settings, catalogue)
        catalogue.update(registry.snapshot().served)
        adapters = [item.adapter for item in catalogue.adapters.values()]
        self._engine = await StockEngine.start(self.settings, adapters)
        self.labeler = Labeler(self._engine, catalogue, load_tokenizer(self.settings.model))

    async def _stop(self):
        await self._engine.close()
