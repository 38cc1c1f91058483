"""One engine of `bench shape` in a process of its own, so that its memory goes when it ends.

`python -m bench.shape_engine FOLDER` reads FOLDER/engine.json, starts that engine with random
weights and says so; then it takes a block of requests a line on stdin and answers its timing.
Sides: `sieve`, the engine `python -m serving` starts, with the constraint and the log-probabilities
of `serving.labeler`; and `vllm`, the stock architecture without our plugin on the same engine
settings, which decodes as many tokens freely. `before` is ours with other variables or settings.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from bench.checkpoints import IMAGE_TOKEN_ID
from bench.line_process import replies, reply
from bench.pictures import picture
from bench.shape_process import Timing
from patches.config import Retention
from serving.settings import Settings

OURS, THEIRS, BEFORE = "sieve", "vllm", "before"
STRUCTURES_BY_ANSWER = {"one": "sentiment", "three": "llavac"}
PROFILE_FOLDER = "profile"

_PROPOSALS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")

Send = Callable[[dict[str, Any], list[int], Image.Image], Awaitable[None]]


def prompt_ids(seed: int, number: int, text_tokens: int) -> list[int]:
    """BOS, an image and random text: `text_tokens` without the image, never the same twice."""
    rng = np.random.default_rng((seed, number))
    return [1, IMAGE_TOKEN_ID, *rng.integers(300, IMAGE_TOKEN_ID, text_tokens - 1).tolist()]


def _count(name: str) -> int:
    """A counter of vLLM's, 0 where the engine has none of that name."""
    from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

    found = [m for m in get_metrics_snapshot() if m.name == name and isinstance(m, Counter)]
    return sum(counter.value for counter in found)


class Side:
    """An engine that can be sent blocks.

    Args:
        plan: what engine.json says.
        folder: of the checkpoint without weights.
    """

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        self._plan = plan
        self._settings = Settings(model=str(folder), **plan["settings"])
        self._is_ours = plan["side"] != THEIRS
        self._llm = self._start(folder)
        self._send = self._ours() if self._is_ours else self._theirs()

    def _start(self, folder: Path) -> Any:
        from serving import engine

        engine.prepare_environment(self._settings)
        import torch
        from vllm.v1.engine.async_llm import AsyncLLM

        torch.set_num_threads(1)  # this process resizes images beside the worker's threads
        arguments = engine.engine_args(self._settings, None)
        arguments.load_format = "dummy"
        if not self._is_ours:
            arguments.hf_overrides = {}
            arguments.worker_extension_cls = ""
        if self._plan["profile"]:
            arguments.profiler_config = {
                "profiler": "torch",
                "torch_profiler_dir": str(folder / PROFILE_FOLDER),
                "torch_profiler_with_stack": False,
                "torch_profiler_use_gzip": False,
            }
        return AsyncLLM.from_engine_args(arguments)

    def _ours(self) -> Send:
        """Through the engine and the constraint that `POST /v1/label` uses."""
        from serving.constraint import compile_structure
        from serving.engine import VllmEngine
        from serving.engine_queue import EngineQueue
        from serving.facts import engine_info
        from serving.loaded_adapters import LoadedAdapters
        from serving.prompts import encode_answer, render_chat
        from serving.protocol import Generation
        from serving.server import load_tokenizer
        from serving.structures import STRUCTURES

        settings = self._settings
        # No adapters and no chat here: neither is asked for.
        slots: Any = None
        adapters = LoadedAdapters(slots, None, lambda seconds: None)
        info = engine_info(settings)
        engine = VllmEngine(self._llm, None, None, info, adapters, EngineQueue())
        tokenizer = load_tokenizer(settings.model)
        end = render_chat(tokenizer, "", 0)
        constraints = {
            answer: compile_structure(
                STRUCTURES[name], lambda text: encode_answer(tokenizer, end, text)
            )
            for answer, name in STRUCTURES_BY_ANSWER.items()
        }

        async def send(block: dict[str, Any], ids: list[int], image: Image.Image) -> None:
            constraint = constraints[block["answer"]]
            request = Generation(
                request_id=uuid.uuid4().hex,
                prompt_ids=ids,
                images=[image],
                adapter=None,
                retention=Retention(ratio=block["ratio"], selector=block["selector"]),
                pattern=constraint.pattern,
                max_tokens=constraint.num_steps,
                num_logprobs=constraint.num_logprobs,
            )
            generated = await engine.generate(request)
            assert len(generated.token_ids) == block["num_tokens"], generated.token_ids

        return send

    def _theirs(self) -> Send:
        """VLLM's own engine; a free greedy decode of the same length."""
        from vllm import SamplingParams

        async def send(block: dict[str, Any], ids: list[int], image: Image.Image) -> None:
            assert block["ratio"] == 1.0, "stock vLLM keeps every patch"
            num_tokens = block["num_tokens"]
            params = SamplingParams(
                temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
            )
            prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": [image]}}
            (ready,) = await self._llm.renderer.render_cmpl_async([prompt])
            outputs = [out async for out in self._llm.generate(ready, params, uuid.uuid4().hex)]
            assert len(outputs[-1].outputs[0].token_ids) == num_tokens

        return send

    async def time(self, block: dict[str, Any]) -> Timing:
        """How long it takes until all requests of a block, sent at once, are answered."""
        seed, length = self._plan["seed"], self._plan["text_tokens"]
        numbers = range(block["first"], block["first"] + block["count"])
        posts = [(prompt_ids(seed, n, length), picture(seed, n)) for n in numbers]
        if block["profile"]:
            await self._llm.start_profile(profile_prefix=block["profile"])
        earlier = [_count(name) for name in _PROPOSALS]
        started = time.perf_counter()
        await asyncio.gather(*(self._send(block, *post) for post in posts))
        seconds = time.perf_counter() - started
        proposed, taken = (_count(n) - e for n, e in zip(_PROPOSALS, earlier, strict=True))
        if block["profile"]:
            await self._llm.stop_profile()
        return Timing(seconds=seconds, proposed=proposed, taken=taken)

    def close(self) -> None:
        """Ends the engine."""
        self._llm.shutdown()


async def serve(folder: Path, stream: TextIO) -> None:
    """Starts the engine and times blocks until stdin ends."""
    side = Side(json.loads((folder / "engine.json").read_text()), folder)
    try:
        reply(stream)
        while line := await asyncio.to_thread(sys.stdin.readline):
            timing = await side.time(json.loads(line))
            reply(stream, json.dumps(asdict(timing)))
    finally:
        side.close()


if __name__ == "__main__":
    with replies() as answers:
        asyncio.run(serve(Path(sys.argv[1]), answers))
