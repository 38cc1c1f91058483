"""The same posts to our server and to vLLM's own: command lines, bodies and closed-loop load."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.outcome import BenchError
from bench.pictures import picture_url
from bench.processes import Server, free_port
from serving.adapters import lora_room
from serving.protocol import Adapter
from serving.server import catalogue_of, open_registry
from serving.settings import Settings
from serving.structures import STRUCTURES

OURS, THEIRS = "sieve", "vllm"
WORKLOADS = ("label", "choice", "chat")
_STRUCTURE = STRUCTURES["sentiment"]
_WORDS = ("a", "great", "very", "good", "bad", "day", "in", "the", "park", "with", "new", "phone")
_EQUAL = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",  # an idle server's threads do not spin on the other's cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Post:
    """One request's content.

    Attributes:
        text: of the post.
        image: as a data URL.
    """

    text: str
    image: str


def make_text(seed: int, index: int) -> str:
    """Twelve words, the same for the same seed and index."""
    return " ".join(np.random.default_rng((seed, index, 1)).choice(_WORDS, 12))


class Posts:
    """Posts that were never sent before.

    Args:
        seed: of texts and images.
        size: of the images.
    """

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        self._seed, self._size, self._numbers = seed, size, itertools.count()

    def fresh(self) -> Post:
        """One more."""
        number = next(self._numbers)
        image = picture_url(self._seed, number, self._size)
        return Post(text=make_text(self._seed, number), image=image)

    def block(self, size: int) -> list[Post]:
        """So many more."""
        return [self.fresh() for _ in range(size)]


def our_server(settings: Settings, num_threads: int) -> Server:
    """`python -m serving` at ratio 1.0, without the prefix cache."""
    port = free_port()
    arguments = ["-m", "serving", "--model", settings.model, "--model-name", settings.served_name]
    arguments += ["--port", str(port), "--dtype", settings.dtype, "--no-prefix-caching"]
    arguments += ["--retention", "1.0", "--kv-cache-gib", str(settings.kv_cache_gib)]
    arguments += ["--max-num-seqs", str(settings.max_num_seqs)]
    if settings.adapters_folder is not None:
        arguments += ["--adapters", str(settings.adapters_folder)]
    environment = equal_environment(settings, num_threads)
    return Server(
        name=OURS, arguments=arguments, port=port, ready_path="/readyz", environment=environment
    )


def their_server(settings: Settings, num_threads: int) -> Server:
    """VLLM's OpenAI server: stock architecture, no plugin, the engine arguments of ours."""
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    arguments += ["--host", "127.0.0.1", *engine_arguments(settings)]
    arguments += ["--no-enable-prefix-caching"]
    environment = {**equal_environment(settings, num_threads), "VLLM_PLUGINS": ""}
    return Server(
        name=THEIRS, arguments=arguments, port=port, ready_path="/health", environment=environment
    )


def engine_arguments(settings: Settings) -> list[str]:
    """Arguments of vLLM's commands that make the engine of `serving.engine`, adapters included."""
    arguments = ["--model", settings.model, "--served-model-name", settings.served_name]
    arguments += ["--dtype", settings.dtype, "--enforce-eager"]
    arguments += ["--max-num-seqs", str(settings.max_num_seqs), "--block-size", "32"]
    arguments += ["--limit-mm-per-prompt", f'{{"image": {settings.max_images}}}']
    arguments += ["--structured-outputs-config", '{"backend": "outlines"}']
    return [*arguments, *_lora_arguments(settings)]


def equal_environment(settings: Settings, num_threads: int) -> dict[str, str]:
    """The same threads, cache and quiet for whoever is compared."""
    kv_cache = {"VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib)}
    return {**_EQUAL, **kv_cache, "OMP_NUM_THREADS": str(num_threads)}


def _lora_arguments(settings: Settings) -> list[str]:
    """The same adapters, rank and slots as `serving.engine` asks for."""
    if settings.adapters_folder is None:
        return []
    adapters = served_adapters(settings)
    room = lora_room(settings, adapters)
    if room is None or not adapters:
        return []
    limits = ["--max-lora-rank", str(room.max_rank), "--max-loras", str(room.max_loras)]
    limits += ["--max-cpu-loras", str(room.max_cpu_loras)]
    modules = [f"{adapter.name}={Path(adapter.path).resolve()}" for adapter in adapters]
    return ["--enable-lora", *limits, "--lora-modules", *modules]


def served_adapters(settings: Settings) -> list[Adapter]:
    """The adapters that a server with these settings has."""
    return asyncio.run(_served_adapters(settings))


async def _served_adapters(settings: Settings) -> list[Adapter]:
    registry = await open_registry(settings, catalogue_of(settings))
    return [installed.adapter for installed in registry.snapshot().served.values()]


class Contest:
    """Bodies of each workload for both servers.

    Args:
        model: the model or adapter that is asked.
        max_tokens: decoded tokens of one label, found by `probe`.
        adds_bos: whether their chat must add the BOS that ours adds.
    """

    def __init__(self, model: str, *, max_tokens: int, adds_bos: bool) -> None:
        self._model, self._max_tokens, self._adds_bos = model, max_tokens, adds_bos

    def request(self, workload: str, side: str, post: Post) -> tuple[str, Body]:
        """Path and JSON body."""
        if workload == "label" and side == OURS:
            body: Body = {"model": self._model, "text": post.text, "image": post.image}
            return "/v1/label", {**body, "label_structure": _STRUCTURE.name, "retention_ratio": 1.0}
        body = self._chat(post)
        if workload != "chat":
            (labels,) = _STRUCTURE.fields.values()
            body |= {"structured_outputs": {"choice": list(labels)}}
            body["max_tokens"] = self._max_tokens
        if side == THEIRS:
            body["add_special_tokens"] = self._adds_bos
        else:
            body["retention_ratio"] = 1.0
        return "/v1/chat/completions", body

    def _chat(self, post: Post) -> Body:
        content = [
            {"type": "image_url", "image_url": {"url": post.image}},
            {"type": "text", "text": _STRUCTURE.prompt.replace("{text}", post.text)},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": self._model, "messages": messages, "max_tokens": 1, "temperature": 0.0}


async def closed_loop(
    client: httpx.AsyncClient,
    requests: Sequence[tuple[str, Body]],
    concurrency: int,
    answers: dict[int, Body] | None = None,
) -> float:
    """Seconds until all requests are answered, at most `concurrency` of them at once.

    Args:
        client: of the server.
        requests: paths and bodies.
        concurrency: connections.
        answers: gets each request's answer by its position, where given.

    Raises:
        BenchError: an answer is not a 200; quotes it.
    """
    waiting = enumerate(requests)
    found = {} if answers is None else answers

    async def worker() -> None:
        for position, (path, body) in waiting:
            found[position] = await post_json(client, path, body)

    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return time.perf_counter() - started


async def post_json(client: httpx.AsyncClient, path: str, body: Body) -> Body:
    """The answer's body.

    Raises:
        BenchError: it is not a 200; quotes it.
    """
    response = await client.post(path, json=body)
    if response.status_code != 200:
        raise BenchError(f"{client.base_url}{path}: {response.status_code} {response.text[:300]}")
    found: Body = response.json()
    return found


async def probe(
    clients: dict[str, httpx.AsyncClient], model: str, fresh: Callable[[], Post]
) -> tuple[Contest, list[str]]:
    """What makes both servers do the same work, and a line on what that is.

    Raises:
        BenchError: they read prompts of different lengths, so no ratio would mean anything.
    """
    post = fresh()
    trial = Contest(model, max_tokens=16, adds_bos=True)
    ours = (await post_json(clients[OURS], *trial.request("label", OURS, post)))["usage"]
    lengths = {}
    for adds_bos in (True, False):
        contest = Contest(model, max_tokens=ours["completion_tokens"], adds_bos=adds_bos)
        answer = await post_json(clients[THEIRS], *contest.request("chat", THEIRS, post))
        lengths[adds_bos] = answer["usage"]["prompt_tokens"]
        if lengths[adds_bos] == ours["prompt_tokens"]:
            line = (
                f"prompts of {ours['prompt_tokens']} tokens on both servers, "
                f"{ours['completion_tokens']} decoded for a label"
            )
            return contest, [line]
    raise BenchError(
        f"our prompt has {ours['prompt_tokens']} tokens, vLLM's {lengths}: not the same work"
    )
