"""Server-sent events on their way from vLLM to a client."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing

from serving.errors import SieveError

Failure = Callable[[int, str, str | None], SieveError]
"""From vLLM's status, message and field to what a client is told."""

ENGINE_STOPPED = "the engine stopped; try again shortly"


async def held_stream(events: AsyncIterator[str], held: AsyncExitStack) -> AsyncIterator[str]:
    """A stream that holds on to something until its last event."""
    async with held:
        async for event in events:
            yield event


async def begun_stream(events: AsyncIterator[str], failure: Failure) -> AsyncIterator[str]:
    """VLLM's stream once its first text is there: what fails before it has a status of its own.

    VLLM opens every choice with an event that only says who speaks, and with the first text at
    hand; also where there is none.

    Raises:
        SieveError: the request failed before that; a later failure raises where it is.
    """
    stream, first = _failing(events, failure), list[str]()
    try:
        async for event in stream:
            first.append(event)
            if not _is_opening(event):
                break
    except BaseException:
        await stream.aclose()
        raise
    return _resumed(first, stream)


def _is_opening(event: str) -> bool:
    if not event.startswith("data: {"):
        return False
    choices = json.loads(event.removeprefix("data: ")).get("choices", [])
    return any("role" in choice["delta"] for choice in choices)


async def _resumed(first: list[str], stream: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(stream):
        for event in first:
            yield event
        async for event in stream:
            yield event


async def _failing(events: AsyncIterator[str], failure: Failure) -> AsyncGenerator[str, None]:
    try:
        async for event in events:
            if event.startswith('data: {"error"'):
                error = json.loads(event.removeprefix("data: "))["error"]
                raise failure(int(error["code"]), str(error["message"]), error.get("param"))
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


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
