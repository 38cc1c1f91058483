"""What a post costs by its architecture: FLOP, bytes, the least time, posts a day.

Counts operations and bytes of tower, projector, prefill and decoding at each ratio, and takes the
longer of computing and moving on each device: a roofline, so a floor under what can be measured.
`cpu` is this machine, its peaks measured by a second of matrix products and copies; `h200` and
`a100` are data-sheet values (bf16, dense). --sweep and --shape put what was measured beside it.

  python -m bench cost                                    LLaVA-1.5-7B on H200 and A100
  python -m bench cost --model demo --devices cpu --sweep runs/sweep/report.json

Posts a day are 86,400 s over the floor, times --efficiency: what share of the floor a server
reaches. That is an assumption, not a measurement. Goal: a bound that measurements can be held
against, with every assumption in its notes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.flops import PAPER_SPEEDUPS, RATIOS, SHAPES, Shape
from bench.outcome import BenchError, Outcome, positive
from bench.roofline import DEVICES, Device, Request, number_type_of, probe_cpu, shape_of, works
from serving.settings import DEMO

EFFICIENCY = 0.5
DAY_MS = 86_400_000.0
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    names = ", ".join(SHAPES)
    add("--model", default="llava-1.5-7b", help=f"{names}, demo, or a folder (default the 7B)")
    kinds = [*DEVICES, "cpu"]
    add("--devices", nargs="+", choices=kinds, default=list(DEVICES), help="default h200 a100")
    add("--threads", type=positive, help="of cpu (default: all cores)")
    add("--text-tokens", type=positive, default=50, help="of a prompt (default 50)")
    add("--output-tokens", type=positive, default=1, help="decoded (default 1)")
    add("--batch", type=positive, default=32, help="posts that share a step (default 32)")
    add("--efficiency", type=float, default=EFFICIENCY, help="share of the floor (default 0.5)")
    add("--sweep", type=Path, help="report.json of `bench sweep`: measured beside it")
    add("--shape", type=Path, help="JSON of `bench shape`: measured beside it")


def run(options: argparse.Namespace) -> Outcome:
    """Counts; measures only the peaks of `cpu`."""
    if not 0 < options.efficiency <= 1:
        raise BenchError(f"--efficiency {options.efficiency}: above 0 and up to 1, such as 0.5")
    shape, number_type = _chosen(options.model)
    cpu = {"cpu": probe_cpu(number_type, options.threads)} if "cpu" in options.devices else {}
    known = {**DEVICES, **cpu}
    devices = [known[name] for name in options.devices]
    measured = _measured(options)
    found = costs(
        shape,
        devices,
        list(measured) or list(RATIOS),
        text_tokens=options.text_tokens,
        output_tokens=options.output_tokens,
        batch=options.batch,
        number_bytes=_BYTES.get(number_type, 2),
        efficiency=options.efficiency,
        measured_ms=measured,
    )
    return Outcome(
        title=f"Cost of a post, {options.model}: {options.text_tokens} text and "
        f"{options.output_tokens} output token(s), {options.batch} posts a step, {number_type}",
        headers=headers(devices, bool(measured)),
        rows=rows(found, devices),
        notes=assumptions(found),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=found,
        samples=[],
    )


def _chosen(model: str) -> tuple[Shape, str]:
    if model in SHAPES:
        return SHAPES[model], "bfloat16"
    folder = DEMO / "base" if model == "demo" else Path(model)
    return shape_of(folder), number_type_of(folder)


def _measured(options: argparse.Namespace) -> dict[float, float]:
    """Milliseconds a post by ratio."""
    if options.sweep is not None:
        return sweep_ms(read_results(options.sweep, "cells", "--sweep")["cells"])
    if options.shape is not None:
        return shape_ms(read_results(options.shape, "1.0", "--shape"))
    return {}


def read_results(path: Path, key: str, flag: str) -> dict[str, Any]:
    """The results of a command's JSON.

    Raises:
        BenchError: the file is not there or is another command's.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{flag} {path}: not a JSON that --json wrote: {error!r}") from error
    if key not in found:
        raise BenchError(f"{flag} {path}: has no {key!r} in its results; is it another command's?")
    return found


def sweep_ms(cells: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Of a sweep: a second over posts/s, saturated, of the first selector at each ratio."""
    found: dict[float, float] = {}
    for cell in cells:
        found.setdefault(cell["ratio"], 1e3 / cell["posts_per_s"]["median"])
    return found


def shape_ms(results: Mapping[str, Any]) -> dict[float, float]:
    """Of `bench shape`: one request at a time."""
    return {
        float(ratio): 1e3 * cell["median_s"]
        for ratio, cell in results.items()
        if isinstance(cell, dict) and "median_s" in cell
    }


def costs(
    shape: Shape,
    devices: Sequence[Device],
    ratios: Sequence[float],
    *,
    text_tokens: int,
    output_tokens: int,
    batch: int,
    number_bytes: int = 2,
    efficiency: float = EFFICIENCY,
    measured_ms: Mapping[float, float] | None = None,
) -> dict[str, Any]:
    """Costs of a post at each ratio, for tables and JSON."""
    found = []
    for ratio in ratios:
        request = Request(
            ratio=ratio,
            text_tokens=text_tokens,
            output_tokens=output_tokens,
            batch=batch,
            number_bytes=number_bytes,
        )
        found.append(_cost(shape, devices, request, efficiency, (measured_ms or {}).get(ratio)))
    return {
        "devices": [vars(device) for device in devices],
        "text_tokens": text_tokens,
        "output_tokens": output_tokens,
        "batch": batch,
        "number_bytes": number_bytes,
        "efficiency": efficiency,
        "ratios": found,
    }


def _cost(
    shape: Shape,
    devices: Sequence[Device],
    request: Request,
    efficiency: float,
    measured_ms: float | None,
) -> dict[str, Any]:
    stages = works(shape, request)
    floors = {device.name: sum(work.ms(device) for work in stages) for device in devices}
    return {
        "ratio": request.ratio,
        "flops": sum(work.flops for work in stages),
        "bytes": sum(work.bytes for work in stages),
        "stages": [vars(work) for work in stages],
        "floor_ms": floors,
        "posts_per_day": {name: efficiency * DAY_MS / ms for name, ms in floors.items()},
        "measured_ms": measured_ms,
        "flop_speedup": shape.speedup(
            request.ratio, text_tokens=request.text_tokens, output_tokens=request.output_tokens
        ),
        "paper_speedup": PAPER_SPEEDUPS.get(request.ratio),
    }


def headers(devices: Sequence[Device], is_measured: bool) -> list[str]:
    """Of `rows`."""
    of_devices = [f"{device.name} {what}" for device in devices for what in ("ms", "posts/day")]
    return ["ratio", "GFLOP", "MB", "FLOP speed-up", *of_devices, *(["measured ms"] * is_measured)]


def rows(found: Mapping[str, Any], devices: Sequence[Device]) -> list[list[object]]:
    """A row a ratio."""
    return [
        [
            f"{cost['ratio']:g}",
            f"{cost['flops'] / 1e9:,.4g}",
            f"{cost['bytes'] / 1e6:,.4g}",
            f"{cost['flop_speedup']:.2f}",
            *(
                text
                for device in devices
                for text in (
                    f"{cost['floor_ms'][device.name]:.3g}",
                    f"{cost['posts_per_day'][device.name]:,.3g}",
                )
            ),
            *([] if cost["measured_ms"] is None else [f"{cost['measured_ms']:.4g}"]),
        ]
        for cost in found["ratios"]
    ]


def assumptions(found: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, a line each."""
    peaks = [
        f"{device['name']}: {device['flops_per_s'] / 1e12:.3g} TFLOP/s, "
        f"{device['bytes_per_s'] / 1e9:,.4g} GB/s ({device['source']})"
        for device in found["devices"]
    ]
    return [
        *peaks,
        "ms is a floor: each stage at the device's peak, nothing else in the way (no HTTP, no "
        "image decoding, no scheduling), weights read once for all posts of a step",
        f"posts/day is {found['efficiency']:.0%} of what the floor allows on one device, an "
        "assumption; decoding images takes processor cores beside it",
    ]
