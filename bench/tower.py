"""The vision tower with [CLS] scoring beside vLLM's own tower.

CLIP-L/336 with random weights, as vLLM builds it for LLaVA-1.5 (23 of 24 layers), in this process:

  stock    vLLM's CLIPVisionModel, features of all patches
  served   our tower as a request at ratio 1.0 gets it: nothing is scored, nothing is dropped
  scored   our tower with the [CLS] row of all 24 layers, as any ratio below 1.0 gets it
  scoring  the scoring alone, on the queries and keys of one forward, the probe included

All four share one set of weights. Goals: served and scored at >= 0.98 of stock's throughput,
scoring < 1 % of the tower's time. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bench.flops import Shape
from bench.outcome import Outcome, positive, progress
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS = ("stock", "served", "scored", "scoring")
GOAL_THROUGHPUT = 0.98
GOAL_SHARE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--rounds", type=positive, default=20, help="timed rounds (default 20)")
    add("--warmup", type=positive, default=2, help="rounds before, not counted (default 2)")
    add("--images", type=positive, default=1, help="images in one call (default 1)")
    add("--layers", type=positive, default=24, help="layers of the checkpoint (default 24)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")


def run(options: argparse.Namespace) -> Outcome:
    """Builds the tower and times the four variants."""
    import torch

    from bench.modules import build_tower

    shape = Shape(tower_layers=max(2, options.layers))
    progress(f"building {shape.tower_layers - 1} layers and the probe ...")
    with torch.inference_mode(), build_tower(shape, options.dtype, options.images) as towers:
        calls = towers.calls()
        samples = time_calls(calls, towers.fresh_pixels, options)
    return summarise(samples, shape, options)


def time_calls(
    calls: Mapping[str, Callable[[Tensor], Any]],
    fresh_pixels: Callable[[int], Tensor],
    options: argparse.Namespace,
) -> list[Sample]:
    """Interleaved rounds; the variants of a round see the same pixels, no two rounds do."""
    import torch

    samples = []
    for index, variant in interleaved(VARIANTS, options.warmup + options.rounds, options.seed):
        pixels = fresh_pixels(options.seed + index)
        started = time.perf_counter()
        calls[variant](pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        counted = index - options.warmup
        if counted >= 0:
            samples.append(Sample(round=counted, variant=variant, seconds=seconds))
            progress(f"round {counted + 1}/{options.rounds} {variant:8} {1e3 * seconds:8.2f} ms")
    return samples


def summarise(samples: list[Sample], shape: Shape, options: argparse.Namespace) -> Outcome:
    """Throughput against stock, and scoring's share."""
    seconds = by_variant(samples)
    stock = seconds["stock"]
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for variant in VARIANTS:
        milliseconds = 1e3 * median(seconds[variant])
        is_tower = variant != "scoring"
        ratio = paired_ratio(stock, seconds[variant]) if is_tower else None
        rows.append([variant, f"{milliseconds:.2f}", ratio if ratio else ""])
        results[variant] = {"median_ms": milliseconds, "throughput_of_stock": vars_or_none(ratio)}
    alone = paired_ratio(seconds["scoring"], stock)
    within = paired_ratio(seconds["scored"], seconds["served"])
    results |= {"scoring_share": vars(alone), "scored_over_served": vars(within)}
    return Outcome(
        title=f"Tower: CLIP-L/336, {shape.tower_layers} layers, {options.dtype}, "
        f"{options.images} image(s) a call, {options.rounds} rounds",
        headers=["variant", "median ms", "throughput of stock [95 %]"],
        rows=rows,
        notes=[
            f"scoring alone is {_percent(alone)} of the stock tower's time "
            f"(goal < {GOAL_SHARE:.0%})",
            f"scored takes {within} times as long as served",
            f"goal for served and scored: >= {GOAL_THROUGHPUT} of stock's throughput",
        ],
        settings={"rounds": options.rounds, "warmup": options.warmup, "images": options.images}
        | {"layers": shape.tower_layers, "dtype": options.dtype, "seed": options.seed},
        results=results,
        samples=samples,
    )


def _percent(share: Any) -> str:
    return f"{share.median:.2%} [{share.low:.2%}, {share.high:.2%}]"


def vars_or_none(estimate: Any) -> dict[str, Any] | None:
    """A dataclass as plain values."""
    return None if estimate is None else vars(estimate)
