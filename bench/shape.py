"""Speed at each retention ratio on LLaVA-1.5-7B's shape, beside the paper's and the FLOP model's.

Random weights (speed does not depend on them) in bf16 on vLLM in this process, one request at a
time, one decoded token; every request has a fresh image and --text-tokens of random text. Each
round runs all ratios in an order drawn anew; a speed-up is ratio 1.0's time over the ratio's, of
one round. The full shape takes 14 GB and about two minutes to load. Goal: above the paper's
speed-up at each ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import IMAGE_TOKEN_ID, write_shape
from bench.flops import PAPER_SPEEDUPS, RATIOS, Shape
from bench.outcome import BenchError, Outcome, positive, progress
from bench.pictures import picture
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from patches.config import Retention
from serving.settings import Settings

NUM_LABEL_TOKENS = {"one": 1, "three": 6}
"""Decoded tokens: one label, or three with their commas and the end token."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--rounds", type=positive, default=4, help="timed rounds (default 4)")
    add("--warmup", type=positive, default=1, help="rounds before, not counted (default 1)")
    add("--layers", type=positive, default=32, help="layers of the language model (default 32)")
    add("--tower-layers", type=positive, default=24, help="layers of the tower (default 24)")
    add("--text-tokens", type=positive, default=50, help="prompt beside the image (default 50)")
    add("--three-label", action="store_true", help="decode 6 tokens, a three-label answer")
    add("--selector", default="cls", help="which patches are kept (default cls)")
    add("--tokenizer", type=Path, help="folder of Llama's tokenizer; without it a small one")
    add("--kv-cache-gib", type=positive, default=2, help="KV cache on CPU (default 2)")


def run(options: argparse.Namespace) -> Outcome:
    """Loads the shape once and times every ratio."""
    if options.tower_layers < 2 or options.text_tokens < 2:
        raise BenchError("--tower-layers and --text-tokens start at 2")
    try:
        Retention(selector=options.selector)
    except ValueError as error:
        raise BenchError(f"--selector: {error}") from error
    shape = Shape(layers=options.layers, tower_layers=options.tower_layers)
    with tempfile.TemporaryDirectory(prefix="sieve-shape-") as folder:
        write_shape(Path(folder), shape, options.tokenizer)
        samples = asyncio.run(_measure(folder, shape, options))
    return summarise(samples, shape, options)


def num_output_tokens(options: argparse.Namespace) -> int:
    """Decoded tokens of a request."""
    return NUM_LABEL_TOKENS["three" if options.three_label else "one"]


async def _measure(folder: str, shape: Shape, options: argparse.Namespace) -> list[Sample]:
    progress(f"loading {shape.layers} + {shape.tower_layers - 1} layers of random weights ...")
    started = time.perf_counter()
    llm = start_engine(folder, options)
    progress(f"ready in {time.perf_counter() - started:.0f} s")
    try:
        return await _time_requests(llm, options)
    finally:
        llm.shutdown()


def start_engine(folder: str, options: argparse.Namespace) -> Any:
    """The engine `python -m serving` would start, with random weights and no prefix cache."""
    from serving import engine

    chosen: dict[str, Any] = {
        "model": folder,
        "model_name": "shape",
        "dtype": "bfloat16",
        "max_model_len": 1024 + options.text_tokens,
        "max_num_seqs": 2,
        "max_images": 1,
        "kv_cache_gib": options.kv_cache_gib,
        "prefix_caching": False,
    }
    settings = Settings(**chosen)
    engine.prepare_environment(settings)
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine.engine_args(settings, None)
    arguments.load_format = "dummy"
    return AsyncLLM.from_engine_args(arguments)


async def _time_requests(llm: Any, options: argparse.Namespace) -> list[Sample]:
    names = {str(ratio): ratio for ratio in RATIOS}
    samples: list[Sample] = []
    order = interleaved(list(names), options.warmup + options.rounds, options.seed)
    for number, (index, name) in enumerate(order):
        retention = Retention(ratio=names[name], selector=options.selector)
        prompt = _prompt(number, retention, options)
        started = time.perf_counter()
        await _generate(llm, prompt, num_output_tokens(options))
        seconds = time.perf_counter() - started
        counted = index - options.warmup
        if counted >= 0:
            samples.append(Sample(round=counted, variant=name, seconds=seconds))
        label = f"round {counted + 1}/{options.rounds}" if counted >= 0 else "warm-up"
        progress(f"{label} ratio {name:4} {seconds:7.3f} s")
    return samples


def _prompt(number: int, retention: Retention, options: argparse.Namespace) -> dict[str, Any]:
    """A post no cache has seen: BOS, an image and random text, `text_tokens` without the image."""
    rng = np.random.default_rng((options.seed, number))
    text = rng.integers(300, IMAGE_TOKEN_ID, options.text_tokens - 1).tolist()
    return {
        "prompt_token_ids": [1, IMAGE_TOKEN_ID, *text],
        "multi_modal_data": {"image": [picture(options.seed, number)]},
        "mm_processor_kwargs": retention.processor_kwargs(),
    }


async def _generate(llm: Any, prompt: dict[str, Any], num_tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
    )
    (engine_input,) = await llm.renderer.render_cmpl_async([prompt])
    outputs = [each async for each in llm.generate(engine_input, params, uuid.uuid4().hex)]
    assert len(outputs[-1].outputs[0].token_ids) == num_tokens


def summarise(samples: Sequence[Sample], shape: Shape, options: argparse.Namespace) -> Outcome:
    """Measured, modelled and published speed-ups of each ratio."""
    seconds = by_variant(samples)
    full = seconds[str(RATIOS[0])]
    tokens = num_output_tokens(options)
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for ratio in RATIOS:
        measured = paired_ratio(full, seconds[str(ratio)])
        model = shape.speedup(ratio, text_tokens=options.text_tokens, output_tokens=tokens)
        paper = PAPER_SPEEDUPS.get(ratio)
        verdict = "" if paper is None else "yes" if measured.median > paper else "no"
        median_s = median(seconds[str(ratio)])
        cells = [f"{median_s:.3f}", measured, f"{model:.2f}"]
        rows.append([f"{ratio:g}", *cells, "" if paper is None else f"{paper:.2f}", verdict])
        results[str(ratio)] = {"median_s": median_s, "speedup": vars(measured)}
        results[str(ratio)] |= {"flop_model": model, "paper": paper}  # type: ignore[operator]
    sizes = f"{shape.layers} + {shape.tower_layers - 1} layers"
    return Outcome(
        title=f"LLaVA-1.5-7B shape ({sizes}), {options.text_tokens} text and {tokens} output "
        f"token(s), {options.rounds} rounds",
        headers=["ratio", "median s", "speed-up [95 %]", "FLOP model", "paper", "above paper"],
        rows=rows,
        notes=_notes(shape, options),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=samples,
    )


def _notes(shape: Shape, options: argparse.Namespace) -> list[str]:
    notes = [
        f"the tower is {shape.tower_flops() / 1e12:.3f} TFLOP an image at every ratio",
        "paper: Table 4 of 'Towards Robust Multimodal Sentiment Detection with LLaVA'",
    ]
    if (shape.layers, shape.tower_layers) != (Shape().layers, Shape().tower_layers):
        notes.append("not the full shape: the paper's speed-ups do not apply")
    return notes
