"""The engines of `bench shape` as its process sees them, and whether they have room."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.flops import Shape
from bench.line_process import LineProcess
from bench.outcome import BenchError, progress

OVERHEAD_BYTES = 5 << 29
"""Of an engine's processes beside weights and KV cache: 2.5 GiB."""
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Block:
    """Requests that are sent at once.

    Attributes:
        ratio: of retention.
        selector: of the kept patches.
        answer: `one` or `three` labels.
        num_tokens: decoded for it.
        count: requests.
        first: number of the first; every number is another post.
        profile: prefix of the profiler's files; empty where none is wanted.
    """

    ratio: float
    selector: str
    answer: str
    num_tokens: int
    count: int
    first: int
    profile: str = ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a block.

    Attributes:
        seconds: until all of it was answered.
        proposed: ids of answers that were proposed meanwhile, where the engine does that.
        taken: of these.
    """

    seconds: float
    proposed: int = 0
    taken: int = 0


class ShapeEngine:
    """A running `bench.shape_engine`.

    Args:
        plan: for its engine.json.
        folder: with the checkpoint's config and tokenizer.
        environment: variables beside ours.

    Raises:
        BenchError: it did not start; quotes the end of its log.
    """

    def __init__(
        self, plan: Mapping[str, Any], folder: Path, environment: Mapping[str, str]
    ) -> None:
        side = str(plan["side"])
        (folder / "engine.json").write_text(json.dumps(dict(plan)))
        started = time.perf_counter()
        progress(f"{side}: starting ...")
        arguments = ["-m", "bench.shape_engine", str(folder)]
        self._process = LineProcess(arguments, folder / f"{side}.log", environment)
        progress(f"{side}: ready in {time.perf_counter() - started:.0f} s")

    def time(self, block: Block) -> Timing:
        """How long the block takes.

        Raises:
            BenchError: the engine ended.
        """
        return Timing(**json.loads(self._process.ask(json.dumps(asdict(block)))))

    @property
    def pid(self) -> int:
        """Of its process, whose children are vLLM's."""
        return self._process.pid

    def stop(self) -> None:
        """Ends it and its processes."""
        self._process.stop()


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory for engines.

    Attributes:
        needed: bytes of one engine.
        available: bytes there are now.
        is_gpu: whether they are a GPU's.
        num_engines: that a run compares.
    """

    needed: int
    available: int
    is_gpu: bool
    num_engines: int = 2

    @classmethod
    def find(cls, shape: Shape, kv_cache_gib: int, num_engines: int) -> Room:
        """What an engine of this shape needs in bfloat16, and what this machine has."""
        needed = 2 * shape.num_parameters + kv_cache_gib * GIB + OVERHEAD_BYTES
        gpu = gpu_bytes()
        available = gpu or available_bytes()
        return cls(
            needed=needed, available=available, is_gpu=gpu is not None, num_engines=num_engines
        )

    def check(self, name: str) -> None:
        """Refuses what does not fit.

        Raises:
            BenchError: says how much is needed and there.
        """
        if self.needed > self.available:
            raise BenchError(
                f"{name} needs {self.needed / GIB:.1f} GiB in bfloat16 and "
                f"{self.available / GIB:.1f} GiB are available; --layers N shrinks it"
            )

    @property
    def holds_all(self) -> bool:
        """Whether all fit side by side; on a GPU each takes its share for itself."""
        return not self.is_gpu and self.num_engines * self.needed <= self.available


def available_bytes() -> int:
    """Memory that processes may take now."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def gpu_bytes() -> int | None:
    """Memory of the first GPU, None where vLLM runs on the CPU."""
    from vllm.platforms import current_platform

    return None if current_platform.is_cpu() else int(current_platform.get_device_total_memory())
