"""Damaged image files and JSON bodies, thousands of them: each is answered or refused, no more.

Small valid files of every format (JPEG, PNG, WEBP, GIF, BMP; also animated, with palettes, CMYK,
16 bit) are damaged and decoded as the server does, in a process of their own that is watched: one
that ends it or takes ten seconds is a failure. Valid bodies of both endpoints are damaged and sent
to the app in this process, whose engine is a stub that answers at once (so there are many), or to
--server. The same --seed makes the same inputs.

Goal: no exception other than a refusal, no 5xx, every error in OpenAI's shape. What fails is
printed with its input in base64, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from bench.bad_pictures import small
from bench.bad_requests import BASE, CHAT, LABEL, data_url
from bench.fuzz_files import FAILED, Failure, fuzz_files
from bench.mutations import changed
from bench.outcome import BenchError, Outcome, positive, progress
from bench.stub_app import stub_app
from serving.client_key import bearer_headers
from serving.settings import Settings

_SHOWN = 20
_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--seconds", type=positive, default=120, help="half a part: files, bodies (default 120)")
    add("--most", type=positive, help="most inputs of each part (default as time allows)")
    add(
        "--server",
        help="URL of a server that gets the bodies (default: the stub)",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Damages files, then bodies; ends with 1 where something failed."""
    half_s = options.seconds / 2
    files, failures = fuzz_files(options.seed, half_s, options.most)
    sending = fuzz_bodies(options.seed, half_s, options.most, options.server)
    bodies, more = asyncio.run(sending)
    failures += more
    for failure in failures[:_SHOWN]:
        print(failure)
    return summarise({**files, **bodies}, failures, options)


def summarise(
    counts: Mapping[str, Counter[str]], failures: list[Failure], options: argparse.Namespace
) -> Outcome:
    """Counts by format or endpoint and by outcome."""
    columns = sorted({outcome for found in counts.values() for outcome in found} - {FAILED})
    rows = [
        [kind, found.total(), *(found[column] for column in columns), found[FAILED]]
        for kind, found in counts.items()
    ]
    total = sum(found.total() for found in counts.values())
    return Outcome(
        title=f"Fuzz: {total} inputs, {len(failures)} failures, seed {options.seed}",
        headers=["input", "tried", *columns, FAILED],
        rows=rows,
        notes=["goal of no failure is " + ("missed" if failures else "met")],
        settings={name: getattr(options, name) for name in ("seconds", "most", "seed", "server")},
        results={kind: dict(found) for kind, found in counts.items()},
        samples=[],
        status=1 if failures else 0,
    )


def valid_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Endpoints and bodies that are answered with 200."""
    url = data_url(small("PNG"))
    shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
    turn = {"role": "user", "content": shown}
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat: dict[str, Any] = {"model": BASE, "messages": [turn], "max_tokens": 2}
    more: list[dict[str, Any]] = [
        {"temperature": 0, "top_p": 0.5, "n": 2, "seed": 1, "stop": ["a", "b"]},
        {"logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "user": "me"},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"label_structure": "llavac", "retention_ratio": 0.4, "selector": "cls"},
        {"structured_outputs": {"choice": ["good", "bad"]}},
        {"response_format": form},
    ]
    label: dict[str, Any] = {"text": "a day", "image": url, "model": BASE}
    wide = {**label, "image": [url, url], "retention_ratio": 0.4, "selector": "stride"}
    steps = {**label, "cascade": [0.2, 1.0], "confidence": 0.9, "timeout_s": 5}
    labels = [label, wide, steps, {**label, "label_structure": "llavac"}]
    return [(LABEL, body) for body in labels] + [(CHAT, {**chat, **each}) for each in more]


def fuzz_settings() -> Settings:
    """Images decode in this process: there is nothing in them here that could end it."""
    chosen: dict[str, Any] = {"model_name": BASE, "image_workers": 0}
    return Settings(**chosen)


@contextlib.asynccontextmanager
async def _client(server: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """Of a running server, or of the app over a stub engine."""
    async with contextlib.AsyncExitStack() as stack:
        if server is None:
            app = await stack.enter_async_context(stub_app(fuzz_settings()))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://fuzz")
        else:
            headers = bearer_headers()
            client = httpx.AsyncClient(base_url=server, headers=headers, timeout=_TIMEOUT_S)
        yield await stack.enter_async_context(client)


async def fuzz_bodies(
    seed: int, seconds: float, most: int | None = None, server: str | None = None
) -> tuple[dict[str, Counter[str]], list[Failure]]:
    """Sends damaged bodies, one after the other."""
    counts = {LABEL: Counter[str](), CHAT: Counter[str]()}
    failures: list[Failure] = []
    bodies = valid_bodies()
    ends, number = time.monotonic() + seconds, 0
    async with _client(server) as client:
        while time.monotonic() < ends and (most is None or number < most):
            path, body = bodies[number % len(bodies)]
            raw = changed(body, random.Random(f"{seed}/body/{number}"))
            headers = {"content-type": "application/json"}
            try:
                fault = fault_of(answer := await client.post(path, content=raw, headers=headers))
            except httpx.ConnectError as error:
                raise BenchError(f"{server}: nobody answers there after {number} bodies") from error
            except httpx.HTTPError as error:
                fault = f"no answer: {error!r}"
            counts[path][FAILED if fault else str(answer.status_code)] += 1
            if fault:
                failures.append(Failure(kind=path, what=fault, raw=raw))
                progress(str(failures[-1]))
            number += 1
    return counts, failures


def fault_of(answer: httpx.Response) -> str:
    """What is wrong with an answer to any request; empty where nothing is."""
    if answer.status_code == 200:
        return ""
    if answer.status_code >= 500 and not _is_passing(answer):
        return f"{answer.status_code} {answer.text[:200]}"
    try:
        error = answer.json()["error"]
    except (KeyError, TypeError, json.JSONDecodeError):
        return f"{answer.status_code} without an error body: {answer.text[:200]}"
    if set(error) != {"message", "type", "param", "code"}:
        return f"an error with {sorted(error)}"
    return ""


def _is_passing(answer: httpx.Response) -> bool:
    return answer.status_code == 503 and "retry-after" in answer.headers
