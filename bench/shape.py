"""Speed at each retention ratio on a real LLaVA-1.5's shape, beside stock vLLM, model and paper.

Random weights (speed does not depend on them) in bf16; nothing is fetched. Shapes: llava-1.5-7b
(14 GB and KV cache, two minutes a start on two cores), llava-1.5-13b (27 GB), and clip-l, the tower
of CLIP-L/336 on a small decoder; --layers and --tower-layers shrink any of them. On the GPU where
vLLM finds one, else on the CPU. Every request has a fresh image and --text-tokens of random text.

  single     one request at a time
  saturated  --concurrency requests sent at once, until the last is answered
  one        one label: `sentiment` under its constraint, with log-probabilities, 1 decoded token
  three      three labels: `llavac` likewise, 5 decoded tokens (3 labels, 2 commas)

Stock vLLM (its own LLaVA class, our plugin not loaded, same engine settings, as many tokens decoded
freely) runs in the same run. Where two engines fit they stand side by side and all variants take
turns within a round; where they do not (two processes cannot share weights), each round has both
engines one after the other, in turning order. A speed-up is ratio 1.0's time over the ratio's, of
one round; the FLOP model counts tower, projector, prefill and decoding.

Goals: single, one label: above the paper's speed-up at each ratio. Saturated, one label: >= 0.9 of
the FLOP model's speed-up at each. Three labels at 0.2: <= 1.6 times one label's time single, <= 1.3
times saturated. The 7B shape takes 12 minutes a round on two cores; --loads, --answers and --ratios
make it shorter. --kernels adds where the worker's time goes: kernels on a GPU, operators on a CPU.
--proposals serves with --label-proposals and says how many proposed ids were taken (of answers that
random weights give). --before adds our engine with other environment variables or, in lower case,
settings of the server: label_proposals=false; or MALLOC_MMAP_THRESHOLD_=33554432 (glibc's most on
its own), with which freed buffers go back to the system.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import write_shape
from bench.flops import RATIOS, SHAPES, Shape
from bench.kernels import Kernel, read_kernels
from bench.outcome import BenchError, Outcome, positive, progress
from bench.process_tree import paused
from bench.processes import stop_on_termination
from bench.shape_engine import BEFORE, OURS, PROFILE_FOLDER, STRUCTURES_BY_ANSWER, THEIRS
from bench.shape_process import GIB, Block, Room, ShapeEngine
from bench.shape_table import Case, summarise
from bench.statistics import Sample, interleaved
from patches.config import Retention

NUM_LABEL_TOKENS = {"one": 1, "three": 5}
"""Decoded tokens of an answer, where labels and commas are one token each, as Llama's are."""
LOADS = ("single", "saturated")
_KERNEL_RATIOS = (1.0, 0.2)
_BLOCK_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("shape", nargs="?", default="llava-1.5-7b", choices=SHAPES, help="default llava-1.5-7b")
    add("--rounds", type=positive, default=3, help="timed rounds (default 3)")
    add("--warmup", type=positive, default=1, help="requests a ratio after a start (default 1)")
    help_ = "single, saturated (default both)"
    add("--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD", help=help_)
    answers = list(STRUCTURES_BY_ANSWER)
    help_ = "one, three (default both)"
    add("--answers", nargs="+", choices=answers, default=answers, metavar="ANSWER", help=help_)
    add("--three-label", action="store_true", help="short for --answers three")
    add("--ratios", nargs="+", type=float, default=list(RATIOS), help="1.0 first (default all)")
    add("--concurrency", type=positive, default=8, help="requests of `saturated` (default 8)")
    add("--no-stock", action="store_true", help="without stock vLLM beside it")
    add("--proposals", action="store_true", help="ours checks proposed label answers")
    add("--before", nargs="+", metavar="NAME=VALUE", help="ours with these, as one more side")
    add("--layers", type=positive, help="layers of the language model (default the shape's)")
    add("--tower-layers", type=positive, help="layers of the tower (default the shape's)")
    add("--text-tokens", type=positive, default=50, help="prompt beside the image (default 50)")
    add("--selector", default="cls", help="which patches are kept (default cls)")
    add("--tokenizer", type=Path, help="folder of Llama's tokenizer; without it a small one")
    add("--kv-cache-gib", type=positive, help="KV cache on CPU (default: as the load needs)")
    add("--kernels", action="store_true", help="also profile a saturated block at 1.0 and 0.2")


def run(options: argparse.Namespace) -> Outcome:
    """Starts the engines, times every case, stops them."""
    shape = chosen_shape(options)
    if options.three_label:
        options.answers = ["three"]
    if options.kv_cache_gib is None:
        options.kv_cache_gib = kv_cache_gib(shape, options)
    with contextlib.ExitStack() as stack:
        stop_on_termination(stack)
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="sieve-shape-"))
        folder = write_shape(Path(name), shape, options.tokenizer)
        num_engines = 1 + (not options.no_stock) + bool(options.before)
        room = Room.find(shape, options.kv_cache_gib, num_engines)
        room.check(options.shape)
        engines = stack.enter_context(contextlib.closing(Engines(folder, room, options)))
        samples = list(time_cases(engines, options))
        kernels = dict(profile(engines, folder, options)) if options.kernels else {}
    notes = [_sharing(room, options), *engines.notes(), *_kernel_notes(kernels, room)]
    outcome = summarise(samples, shape, options, NUM_LABEL_TOKENS, notes)
    found: dict[str, Any] = dict(outcome.results)
    for ratio, each in kernels.items():
        found[str(ratio)]["kernels"] = [vars(kernel) for kernel in each]
    return replace(outcome, results=found)


def chosen_shape(options: argparse.Namespace) -> Shape:
    """The shape with the layers that were asked for.

    Raises:
        BenchError: an option cannot work; said before anything starts.
    """
    before(options)
    shape = SHAPES[options.shape]
    layers, tower_layers = options.layers, options.tower_layers
    shape = replace(shape, layers=layers or shape.layers)
    shape = replace(shape, tower_layers=tower_layers or shape.tower_layers)
    if shape.tower_layers < 2 or options.text_tokens < 2:
        raise BenchError("--tower-layers and --text-tokens start at 2")
    if options.ratios[0] != 1.0 or len(set(options.ratios)) < len(options.ratios):
        raise BenchError(f"--ratios {options.ratios}: 1.0 comes first, and none twice")
    for ratio in options.ratios:
        try:
            Retention(ratio=ratio, selector=options.selector)
        except ValueError as error:
            raise BenchError(f"--ratios, --selector: {error}") from error
    return shape


def before(options: argparse.Namespace) -> dict[str, str]:
    """Variables and settings (in lower case) of the side that is compared with ours.

    Raises:
        BenchError: one has no value.
    """
    pairs = [text.partition("=") for text in options.before or ()]
    if not all(name and sign for name, sign, _ in pairs):
        raise BenchError(f"--before {options.before}: each is NAME=VALUE")
    return {name: value for name, _, value in pairs}


def kv_cache_gib(shape: Shape, options: argparse.Namespace) -> int:
    """Room for all requests of the load at ratio 1.0, in whole GiB."""
    length = shape.num_patches + options.text_tokens + max(NUM_LABEL_TOKENS.values())
    blocks = math.ceil(length / _BLOCK_TOKENS) + 1
    tokens = (options.concurrency * blocks + 1) * _BLOCK_TOKENS
    return math.ceil(tokens * shape.kv_bytes_per_token / GIB)


def cases(options: argparse.Namespace, side: str) -> list[Case]:
    """What a side is timed at: stock vLLM keeps every patch."""
    ratios = [1.0] if side == THEIRS else options.ratios
    order = itertools.product(options.loads, options.answers, ratios)
    return [Case(side=side, load=load, answer=answer, ratio=r) for load, answer, r in order]


class Engines:
    """The engines of both sides; one at a time where two do not fit.

    Args:
        folder: of the checkpoint without weights; each side gets a copy of it.
        room: for them.
        options: of the command.
    """

    def __init__(self, folder: Path, room: Room, options: argparse.Namespace) -> None:
        self._folder, self._room, self._options = folder, room, options
        self._running: dict[str, ShapeEngine] = {}
        self._numbers = 0
        self._proposals: defaultdict[str, Any] = defaultdict(lambda: np.zeros(2, int))

    @property
    def holds_all(self) -> bool:
        """Whether all stand side by side."""
        return self._room.holds_all

    def time(self, case: Case, profile: str = "") -> float:
        """Seconds that a case's requests take together."""
        engine = self._ready(case.side)
        # An engine waits on a core for a second after its last request: the others stand still.
        with paused([each.pid for each in self._running.values() if each is not engine]):
            timing = engine.time(self._block(case, profile))
        self._proposals[case.side] += (timing.proposed, timing.taken)
        return timing.seconds

    def _block(self, case: Case, profile: str = "") -> Block:
        count = self._options.concurrency if case.load == "saturated" else 1
        first = self._numbers
        self._numbers += count
        return Block(
            ratio=case.ratio,
            selector=self._options.selector,
            answer=case.answer,
            num_tokens=NUM_LABEL_TOKENS[case.answer],
            count=count,
            first=first,
            profile=profile,
        )

    def _ready(self, side: str) -> ShapeEngine:
        if side not in self._running:
            if not self.holds_all:
                self.close()
            variables = {"VLLM_PLUGINS": ""} if side == THEIRS else {}
            if side == BEFORE:
                variables |= {k: v for k, v in before(self._options).items() if not k.islower()}
            with paused([each.pid for each in self._running.values()]):
                engine = ShapeEngine(self._plan(side), self._copy(side), variables)
                self._running[side] = engine
                self._warm_up(side, engine)
        return self._running[side]

    def _warm_up(self, side: str, engine: ShapeEngine) -> None:
        for case in cases(self._options, side):
            if case.load == self._options.loads[0] and case.answer == self._options.answers[0]:
                for _ in range(self._options.warmup):
                    seconds = engine.time(self._block(replace(case, load="single"))).seconds
                    progress(f"warm-up {case.name:28} {seconds:8.3f} s")

    def _plan(self, side: str) -> dict[str, Any]:
        options = self._options
        settings: dict[str, Any] = {
            "model_name": "shape",
            "dtype": "bfloat16",
            "max_model_len": 1024 + options.text_tokens,
            "max_num_seqs": max(2, options.concurrency),
            "max_images": 1,
            "kv_cache_gib": options.kv_cache_gib,
            "prefix_caching": False,
            "label_proposals": options.proposals and side != THEIRS,
        }
        if side == BEFORE:
            settings |= {k: v for k, v in before(options).items() if k.islower()}
        sizes = {"seed": options.seed, "text_tokens": options.text_tokens}
        return {"side": side, "settings": settings, "profile": options.kernels, **sizes}

    def _copy(self, side: str) -> Path:
        """The checkpoint's files, linked: logs and plans of the sides stay apart."""
        folder = self._folder / side
        if not folder.is_dir():
            folder.mkdir()
            for path in self._folder.iterdir():
                if path.is_file():
                    os.link(path, folder / path.name)
        return folder

    def notes(self) -> Iterator[str]:
        """How many proposed ids the sides took."""
        for side, (proposed, taken) in self._proposals.items():
            if proposed:
                yield f"{side}: {taken} of {proposed} proposed ids taken"

    def close(self) -> None:
        """Stops what runs."""
        while self._running:
            self._running.popitem()[1].stop()


def time_cases(engines: Engines, options: argparse.Namespace) -> Iterator[Sample]:
    """Every case once a round, in an order drawn anew for each.

    Engines that cannot stand side by side take turns: ours, stock; stock, ours; ours, stock; ...
    """
    sides = [OURS, *([] if options.no_stock else [THEIRS]), *([BEFORE] if options.before else [])]
    by_name = {case.name: case for side in sides for case in cases(options, side)}
    order = list(interleaved(list(by_name), options.rounds, options.seed))
    if not engines.holds_all:
        turns = [sides, sides[::-1]]
        order.sort(key=lambda item: (item[0], turns[item[0] % 2].index(by_name[item[1]].side)))
    for index, name in order:
        case = by_name[name]
        seconds = engines.time(case)
        progress(f"round {index + 1}/{options.rounds} {name:28} {seconds:8.3f} s")
        yield Sample(round=index, variant=name, seconds=seconds)


def profile(
    engines: Engines, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[float, list[Kernel]]]:
    """Where the worker's time goes in one block, at each ratio of interest."""
    for ratio in _KERNEL_RATIOS:
        if ratio in options.ratios:
            prefix = f"ratio-{ratio:g}"
            load, answer = options.loads[-1], options.answers[0]
            engines.time(Case(side=OURS, load=load, answer=answer, ratio=ratio), prefix)
            yield ratio, read_kernels(folder / OURS / PROFILE_FOLDER, prefix)


def _kernel_notes(found: Mapping[float, Sequence[Kernel]], room: Room) -> Iterator[str]:
    kind = "GPU kernels" if room.is_gpu else "CPU operators"
    for ratio, kernels in found.items():
        total = sum(kernel.ms for kernel in kernels)
        shares = ", ".join(f"{k.name} {k.ms / total:.0%}" for k in kernels[:8])
        yield f"{kind} at {ratio:g}, {total:.0f} ms in all: {shares}"


def _sharing(room: Room, options: argparse.Namespace) -> str:
    device = "GPU" if room.is_gpu else f"{len(os.sched_getaffinity(0))} cores"
    place = f"{device}, KV cache {options.kv_cache_gib} GiB"
    if room.num_engines == 1:
        return f"{place}; stock vLLM was not run"
    if room.holds_all:
        return f"{place}; {room.num_engines} engines stood side by side, one working at a time"
    return (
        f"{place}; {room.num_engines} engines took turns by starting anew, since so many of "
        f"{room.needed / GIB:.1f} GiB do not fit into {room.available / GIB:.1f} GiB"
    )
