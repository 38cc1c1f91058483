"""Who labels a block of posts in `bench peers`: servers, vLLM's batches, Hugging Face."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from bench.batch_peer import STRUCTURE, batch_row, chat, race_theirs
from bench.contest import Body, Post, closed_loop
from bench.line_process import LineProcess
from serving.settings import Settings

_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A block that was labelled: how long it took, and the label of each post."""

    seconds: float
    labels: Sequence[str]


class Arm(Protocol):
    """Somebody who labels blocks of posts."""

    def label(self, posts: Sequence[Post]) -> Labelled:
        """Labels them all.

        Raises:
            BenchError: it failed.
        """


class OurServer:
    """`POST /v1/label` of our server.

    Args:
        url: of it.
        ask: model or adapter.
        ratio: of retention; None leaves it to the server.
        concurrency: connections.
    """

    def __init__(self, url: str, ask: str, ratio: float | None, concurrency: int) -> None:
        self._url, self._concurrency = url, concurrency
        self._common: Body = {"model": ask, "label_structure": STRUCTURE.name}
        if ratio is not None:
            self._common["retention_ratio"] = ratio

    def label(self, posts: Sequence[Post]) -> Labelled:
        """In a closed loop."""
        bodies = [{**self._common, "text": post.text, "image": post.image} for post in posts]
        requests = [("/v1/label", body) for body in bodies]
        seconds, answers = asyncio.run(_send(self._url, requests, self._concurrency))
        labels = [next(iter(answer["labels"].values())) for answer in answers]
        return Labelled(seconds=seconds, labels=labels)


class TheirServer:
    """VLLM's chat of the same prompt, with the labels as choices, until the end token.

    Args:
        url: of it.
        ask: model or adapter.
        adds_bos: see `batch_peer.chat_adds_bos`.
        concurrency: connections.
    """

    def __init__(self, url: str, ask: str, adds_bos: bool, concurrency: int) -> None:
        self._url, self._ask, self._adds_bos = url, ask, adds_bos
        self._concurrency = concurrency

    def label(self, posts: Sequence[Post]) -> Labelled:
        """In a closed loop."""
        path = "/v1/chat/completions"
        requests = [(path, vllm_body(self._ask, post, self._adds_bos)) for post in posts]
        seconds, answers = asyncio.run(_send(self._url, requests, self._concurrency))
        labels = [answer["choices"][0]["message"]["content"].strip() for answer in answers]
        return Labelled(seconds=seconds, labels=labels)


def vllm_body(ask: str, post: Post, adds_bos: bool) -> Body:
    """A post as vLLM's server and batches get it."""
    return chat(ask, post.text, post.image) | {"add_special_tokens": adds_bos}


async def _send(
    url: str, requests: Sequence[tuple[str, Body]], concurrency: int
) -> tuple[float, list[Body]]:
    limits = httpx.Limits(max_connections=concurrency)
    client = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False)
    answers: dict[int, Body] = {}
    async with client:
        seconds = await closed_loop(client, requests, concurrency, answers)
    return seconds, [answers[position] for position in range(len(requests))]


class RunBatch:
    """VLLM's `run_batch`: a process a block, timed from its first post to its last answer.

    Args:
        folder: for its files.
        settings: of its engine.
        ask: model or adapter.
        adds_bos: see `batch_peer.chat_adds_bos`.
        num_threads: of its engine.
    """

    def __init__(
        self, folder: Path, settings: Settings, ask: str, adds_bos: bool, num_threads: int
    ) -> None:
        self._folder, self._settings, self._ask = folder, settings, ask
        self._adds_bos, self._num_threads = adds_bos, num_threads
        self._numbers = itertools.count()

    def label(self, posts: Sequence[Post]) -> Labelled:
        """All of them at once, as its engine has room."""
        bodies = [vllm_body(self._ask, post, self._adds_bos) for post in posts]
        with (self._folder / "theirs.jsonl").open("w") as file:
            for number, body in enumerate(bodies):
                file.write(json.dumps(batch_row(str(number), body)) + "\n")
        name = f"run-batch-{next(self._numbers)}"
        race = race_theirs(self._folder, name, self._settings, self._num_threads)
        labels = [race.labels[str(number)] for number in range(len(posts))]
        return Labelled(seconds=race.label_s, labels=labels)


class Generate:
    """Hugging Face's `generate`, in a process that has the model loaded.

    Args:
        process: a `bench.plain_generate`.
        batch_size: posts a call.
    """

    def __init__(self, process: LineProcess, batch_size: int) -> None:
        self._process, self._batch_size = process, batch_size

    def label(self, posts: Sequence[Post]) -> Labelled:
        """One batch after the other."""
        turns = [(STRUCTURE.prompt.replace("{text}", post.text), post.image) for post in posts]
        asked = {"posts": turns, "batch_size": self._batch_size}
        answer: Mapping[str, Any] = json.loads(self._process.ask(json.dumps(asked)))
        return Labelled(seconds=answer["seconds"], labels=answer["labels"])
