"""Server-sent events on their way from vLLM to a client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from serving.errors import EngineDeadError

ENGINE_STOPPED = "the engine stopped; try again shortly"


async def held_stream(events: AsyncIterator[str], held: AsyncExitStack) -> AsyncIterator[str]:
    """A stream that holds on to something until its last event."""
    async with held:
        async for event in events:
            yield event


async def failing_stream(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """VLLM's stream, where the event that says that its engine failed is an exception.

    Raises:
        EngineDeadError: the engine stopped.
    """
    async for event in events:
        if event.startswith('data: {"error"'):
            code = json.loads(event.removeprefix("data: "))["error"]["code"]
            if isinstance(code, int) and code >= 500:
                raise EngineDeadError(ENGINE_STOPPED)
        yield event


async def without_leading_space(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream whose answers start with the label, not with the space of its first piece."""
    started: set[int] = set()
    async for event in events:
        if not event.startswith("data: {"):
            yield event
            continue
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk.get("choices", []):
            content = choice["delta"].get("content")
            if content and choice["index"] not in started:
                choice["delta"]["content"] = content.lstrip()
                started.add(choice["index"])
        yield f"data: {json.dumps(chunk)}\n\n"
