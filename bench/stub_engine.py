"""An engine that only waits: what is left to measure or to test is everything around it.

Stands in for `serving.engine.VllmEngine` in `serving.ray_app.build`. Answers are allowed by their
constraint and mean nothing.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import outlines_core

from patches.canonical import compile_index
from serving.facts import engine_info
from serving.geometry import explained
from serving.loaded_adapters import LoadedAdapters
from serving.metrics import EngineMetrics
from serving.protocol import (
    Adapter,
    ChatCall,
    EngineInfo,
    Explanation,
    Generated,
    Generation,
    LoraRoom,
)
from serving.settings import Settings

SERVICE_MS = "STUB_SERVICE_MS"
_EOS = 2


class StubEngine:
    """Each request takes `STUB_SERVICE_MS` (20 by default), however many there are.

    Args:
        info: facts of the checkpoint it stands in for.
        adapters: which it pretends to load.
    """

    def __init__(self, info: EngineInfo, adapters: LoadedAdapters) -> None:
        self.info, self.adapters = info, adapters
        self._service_s = float(os.environ.get(SERVICE_MS, "20")) / 1e3
        self._processes: list[Any] = []
        self.num_cancelled = 0

    @classmethod
    async def start(
        cls,
        settings: Settings,
        adapters: Sequence[Adapter] = (),
        *,
        room: LoraRoom | None = None,
        metrics: EngineMetrics | None = None,
    ) -> StubEngine:
        """Starts at once."""
        on_load = metrics.adapter_loaded if metrics else lambda seconds: None
        return cls(engine_info(settings), LoadedAdapters(_NoSlots(), room, on_load))

    async def generate(self, request: Generation) -> Generated:
        """The first allowed answer, after the service time."""
        await self._wait(request.adapter)
        token_ids, logprobs = [], []
        guide = outlines_core.Guide(_index(request.pattern))
        for _ in range(request.max_tokens):
            allowed = sorted(guide.get_tokens())[: request.num_logprobs]
            logprobs.append(dict.fromkeys(allowed, -math.log(len(allowed))))
            token_ids.append(allowed[0])
            if allowed[0] == _EOS:
                break
            guide.advance(allowed[0])
        return Generated(
            token_ids=token_ids,
            logprobs=logprobs,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=0,
            queue_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    async def explain(self, request: Generation) -> list[Explanation]:
        """The first patches are kept; images count as cropped to a square."""
        total = self.info.num_patches
        kept = list(range(request.retention.num_kept(total)))
        found: dict[str, list[Any]] = {"scores": [0.0] * total, "cls_attention": [0.0] * total}
        found["kept"] = kept
        side = math.isqrt(total) * 14
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        shape = (len(request.images), 3, side, side)
        return explained([found] * len(request.images), request.images, size, 14, shape)

    async def chat(self, call: ChatCall) -> dict[str, Any] | AsyncIterator[str]:
        """An empty answer, or a stream of ten events over the service time."""
        if call.body.get("stream"):
            return self._events(call)
        await self._wait(call.adapter)
        return {"object": "chat.completion", "choices": [], "id": call.request_id}

    async def _events(self, call: ChatCall) -> AsyncIterator[str]:
        for number in range(10):
            await self._wait(call.adapter, self._service_s / 10)
            chunk = {"choices": [{"index": 0, "delta": {"content": str(number)}}]}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    async def _wait(self, adapter: Adapter | None, seconds: float | None = None) -> None:
        try:
            async with self.adapters.in_use(adapter):
                await asyncio.sleep(self._service_s if seconds is None else seconds)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def tower_images(self) -> int:
        """None ever."""
        return 0

    async def check_health(self) -> None:
        """It is always well."""

    async def ping(self) -> None:
        """It always answers."""

    async def kill(self, *, is_hung: bool = False) -> None:
        """It has no processes."""

    async def close(self) -> None:
        """Nothing runs."""
        self.adapters.close()


class _NoSlots:
    """Holds adapters by number only."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()

    async def load(self, adapter: Adapter, path: str, number: int) -> None:
        self._numbers.add(number)

    async def unload(self, adapter: Adapter, number: int) -> None:
        self._numbers.discard(number)

    async def pin(self, number: int) -> None:
        pass

    async def resident(self) -> set[int]:
        return set(self._numbers)


@functools.cache
def _index(pattern: str) -> Any:
    return compile_index(pattern, _EOS)
