"""The least time a device needs for a post: its operations and bytes against the device's peaks.

Beside the FLOP of `bench.flops`: each matrix product reads its weights, reads its input and writes
its output once; weights are read once for all posts of a step; the KV cache is written once and
read once a decoded token. Norms and look-ups are left out. A stage takes the longer of computing
and moving; no device reaches both peaks, so what is measured is above this.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.flops import Shape
from bench.outcome import BenchError
from patches.selection import num_kept

TOWER_BATCH = 8
"""Images in one call of the tower, as `serving` runs it."""
_PROBE_S = 0.5
_MATRIX = 2048
_COPY_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes.

    Attributes:
        name: of it.
        flops_per_s: peak, dense, at the number type that is used.
        bytes_per_s: peak of its memory.
        source: where the two are from.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str


DEVICES = {
    "h200": Device(
        name="H200 SXM",
        flops_per_s=989e12,
        bytes_per_s=4.8e12,
        source="data sheet, bf16 dense; not measured here",
    ),
    "a100": Device(
        name="A100 SXM 80 GB",
        flops_per_s=312e12,
        bytes_per_s=2.039e12,
        source="data sheet, bf16 dense; not measured here",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage's share of one post.

    Attributes:
        name: of the stage.
        flops: operations.
        bytes: moved between memory and chip.
    """

    name: str
    flops: float
    bytes: float

    def ms(self, device: Device) -> float:
        """The longer of computing and moving."""
        return 1e3 * max(self.flops / device.flops_per_s, self.bytes / device.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One post's sizes.

    Attributes:
        ratio: retention ratio.
        text_tokens: of the prompt, the image's left out.
        output_tokens: decoded, the first one included.
        batch: posts that share a step.
        number_bytes: of a weight or activation.
    """

    ratio: float
    text_tokens: int = 50
    output_tokens: int = 1
    batch: int = 1
    number_bytes: int = 2


def works(shape: Shape, request: Request) -> list[Work]:
    """Tower, projector, prefill and decoding of one post."""
    kept = num_kept(shape.num_patches, request.ratio)
    prompt = kept + request.text_tokens
    steps = request.output_tokens - 1
    numbers = {
        "tower": _tower(shape, min(request.batch, TOWER_BATCH)),
        "projector": _projector(shape, kept, request.batch),
        "prefill": _prefill(shape, prompt, request.batch),
        "decode": sum(_decode(shape, prompt + 1 + step, request.batch) for step in range(steps)),
    }
    flops = {
        "tower": shape.tower_flops(),
        "projector": shape.projector_flops(kept),
        "prefill": shape.prefill_flops(prompt),
        "decode": shape.decode_flops(prompt, request.output_tokens),
    }
    return [
        Work(name=name, flops=flops[name], bytes=request.number_bytes * numbers[name])
        for name in numbers
    ]


def _tower(shape: Shape, batch: int) -> float:
    """Numbers moved for one image; layers that are run are all but one."""
    layers, width, mlp = shape.tower_layers - 1, shape.tower_width, shape.tower_mlp
    weights = layers * (4 * width * width + 2 * width * mlp) + 3 * shape.patch_size**2 * width
    activations = layers * (shape.num_patches + 1) * (12 * width + 2 * mlp)
    return weights / batch + activations


def _projector(shape: Shape, kept: int, batch: int) -> float:
    weights = shape.tower_width * shape.width + shape.width * shape.width
    return weights / batch + kept * (shape.tower_width + 3 * shape.width)


def _language_weights(shape: Shape) -> float:
    layer = 4 * shape.width * shape.width + 3 * shape.width * shape.mlp
    return shape.layers * layer + shape.width * shape.vocab_size


def _prefill(shape: Shape, tokens: int, batch: int) -> float:
    activations = shape.layers * tokens * (12 * shape.width + 6 * shape.mlp)
    written_kv = 2 * shape.layers * shape.width * tokens
    return _language_weights(shape) / batch + activations + written_kv


def _decode(shape: Shape, length: int, batch: int) -> float:
    """One token after so many."""
    read_kv = 2 * shape.layers * shape.width * length
    activations = shape.layers * (12 * shape.width + 6 * shape.mlp)
    return _language_weights(shape) / batch + read_kv + activations


def shape_of(folder: str | Path) -> Shape:
    """Sizes of a LLaVA-1.5 checkpoint folder.

    Raises:
        BenchError: its config.json is not there or is no LLaVA's.
    """
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        text, vision = config["text_config"], config["vision_config"]
        return Shape(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            tower_layers=vision["num_hidden_layers"],
            tower_width=vision["hidden_size"],
            tower_mlp=vision["intermediate_size"],
            tower_heads=vision["num_attention_heads"],
            layers=text["num_hidden_layers"],
            width=text["hidden_size"],
            mlp=text["intermediate_size"],
            heads=text["num_attention_heads"],
            vocab_size=text["vocab_size"],
        )
    except (OSError, KeyError, ValueError) as error:
        raise BenchError(
            f"{path}: not a LLaVA-1.5's config with all its sizes: {error!r}"
        ) from error


def number_type_of(folder: str | Path) -> str:
    """Number type that a checkpoint is stored in, as its config says."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def probe_cpu(number_type: str, num_threads: int | None = None) -> Device:
    """This machine's peaks, by half a second of matrix products and half a second of copies."""
    import torch

    cores = num_threads or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        dtype = getattr(torch, number_type)
        left, right = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
        numbers = torch.empty(_COPY_BYTES // 4).fill_(1.0)
        copied = torch.empty_like(numbers)
        flops = 2 * _MATRIX**3 / _best_s(lambda: left @ right)
        moved = 2 * _COPY_BYTES / _best_s(lambda: copied.copy_(numbers))
    finally:
        torch.set_num_threads(before)
    return Device(
        name=f"this CPU, {cores} threads",
        flops_per_s=flops,
        bytes_per_s=moved,
        source=f"measured: best {number_type} product of {_MATRIX} x {_MATRIX}, best copy",
    )


def _best_s(call: Callable[[], object]) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + _PROBE_S
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)
