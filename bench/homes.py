"""The Ray home beside the server in one process, its ingress alone, and more engines.

Three parts, by --parts:

  home      `python -m serving --ray --replicas 1` beside `python -m serving`, the same random
            checkpoint with CLIP-L/336's tower and a small decoder, one retention ratio; blocks of
            the same fresh posts alternate between them in closed loop. Goal: >= 0.85 of the rate.
  ingress   engines that only wait (--service-ms): what the HTTP side on Ray carries as connections
            grow, and which of its processes is at the end of a core.
  replicas  the demo on 1, 2 and 3 engines of one application, which Serve scales up and down
            between the rounds; on a machine with few cores they share those.

Servers are started on free ports and stopped at the end. Fifteen minutes on two cores for all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from bench.contest import Body, closed_loop, make_text
from bench.fits import write_checkpoint, write_posts
from bench.flops import Shape
from bench.outcome import Outcome, positive, progress
from bench.pictures import picture_url
from bench.processes import Server, free_port, running
from bench.ray_load import cores_of, scaled
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from bench.stub_engine import SERVICE_MS
from serving.client_key import bearer_headers

GOAL = 0.85
PARTS = ("home", "ingress", "replicas")
_RAY = ["--ray", "--ray-cpus", "16"]
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--rounds", type=positive, default=6, help="timed rounds (default 6)")
    add("--block", type=positive, default=24, help="requests in a block (default 24)")
    add("--concurrency", type=positive, default=4, help="requests at once (default 4)")
    add("--retention", type=float, default=0.4, help="of all requests (default 0.4)")
    add("--service-ms", type=positive, default=20, help="of an engine that waits (default 20)")
    add("--connections", type=positive, nargs="+", default=[1, 4, 16, 64], metavar="N")
    add("--seconds", type=positive, default=8, help="a step of part ingress (default 8)")
    add("--most-replicas", type=positive, default=3, help="of part replicas (default 3)")


def run(options: argparse.Namespace) -> Outcome:
    """Runs the parts one after the other."""
    with tempfile.TemporaryDirectory(prefix="sieve-ray-") as name:
        folder = Path(name)
        steps = {"home": _home, "ingress": _ingress, "replicas": _replicas}
        outcomes = [steps[part](folder, options) for part in options.parts]
    return Outcome(
        title="Ray home: "
        + ", ".join(f"{part} {outcome.title}" for part, outcome in zip(options.parts, outcomes)),  # noqa: B905
        headers=["part", "what", "posts/s", "against", "cores"],
        rows=[row for outcome in outcomes for row in outcome.rows],
        notes=[note for outcome in outcomes for note in outcome.notes],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={part: o.results for part, o in zip(options.parts, outcomes)},  # noqa: B905
        samples=[sample for outcome in outcomes for sample in outcome.samples],
    )


class _Posts:
    """Labelling requests, each with an image that was never sent before."""

    def __init__(self, seed: int, retention: float, size: tuple[int, int]) -> None:
        self._seed, self._retention, self._size = seed, retention, size
        self._numbers = itertools.count()

    def block(self, count: int) -> list[tuple[str, Body]]:
        return [self._fresh() for _ in range(count)]

    def _fresh(self) -> tuple[str, Body]:
        number = next(self._numbers)
        image = picture_url(self._seed, number, self._size)
        text = make_text(self._seed, number)
        return "/v1/label", {"text": text, "image": image, "retention_ratio": self._retention}


def _home(folder: Path, options: argparse.Namespace) -> Outcome:
    progress("writing a checkpoint with CLIP-L/336's tower ...")
    posts = write_posts(folder / "posts", 32, options.seed)
    shape = Shape(layers=2, width=512, mlp=1376, heads=8)
    write_checkpoint(folder / "base", shape, posts, options.seed)
    sides = ("process", "ray")
    more: list[list[str]] = [[], [*_RAY, "--replicas", "1"]]
    model = ["--model", str(folder / "base"), "--no-prefix-caching"]
    servers = [_server(side, [*model, *extra]) for side, extra in zip(sides, more, strict=True)]
    samples: list[Sample] = []
    fresh = _Posts(options.seed, options.retention, (336, 336))
    with running(servers, folder):
        urls = {server.name: server.url for server in servers}
        for index, pair in itertools.groupby(
            interleaved(sides, options.rounds + 1, options.seed), key=lambda item: item[0]
        ):
            block = fresh.block(options.block)
            for _, side in pair:
                seconds = asyncio.run(_timed(urls[side], block, options.concurrency))
                progress(f"home round {index}/{options.rounds} {side:7} {seconds:.2f} s")
                if index > 0:  # the first warms up
                    variant = f"home/{side}"
                    samples.append(Sample(round=index, variant=variant, seconds=seconds))
    times = by_variant(samples)
    ratio = paired_ratio(times["home/process"], times["home/ray"])
    rates = {side: options.block / median(times[f"home/{side}"]) for side in sides}
    met = "met" if ratio.median >= GOAL else "missed"
    return Outcome(
        title=f"{options.rounds} rounds of {options.block}",
        headers=[],
        rows=[
            ["home", "in process", f"{rates['process']:.2f}", "1", ""],
            ["home", "on Ray", f"{rates['ray']:.2f}", str(ratio), ""],
        ],
        notes=[f"home: goal of {GOAL} of the rate in process is {met}; both idle servers run"],
        settings={},
        results={"rates": rates, "ratio": vars(ratio)},
        samples=samples,
    )


def _server(name: str, arguments: Sequence[str], **environment: str) -> Server:
    port = free_port()
    return Server(
        name=name,
        arguments=["-m", "serving", "--port", str(port), "--max-num-seqs", "16", *arguments],
        port=port,
        ready_path="/readyz",
        environment={**_ENVIRONMENT, **environment},
    )


async def _timed(url: str, block: Sequence[tuple[str, Body]], concurrency: int) -> float:
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, headers=bearer_headers(), timeout=600, limits=limits, trust_env=False
    ) as client:
        return await closed_loop(client, block, concurrency)


def _ingress(folder: Path, options: argparse.Namespace) -> Outcome:
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    samples: list[Sample] = []
    environment = {SERVICE_MS: str(options.service_ms)}
    with scaled(folder, "bench.stub_engine:StubEngine", 2, environment) as app:
        for index, connections in enumerate(options.connections):
            bodies = [("/v1/label", {"text": f"post {i}"}) for i in range(64)]
            asyncio.run(_timed(app.url, bodies, connections))  # warm
            count = max(64, int(40 * options.seconds * min(connections, 8) / 8))
            requests = [("/v1/label", {"text": f"post {i}"}) for i in range(count)]
            before = app.cpu_seconds()
            seconds = asyncio.run(_timed(app.url, requests, connections))
            cores = cores_of(before, app.cpu_seconds(), seconds)
            rate = count / seconds
            progress(f"ingress {connections} connections: {rate:.0f}/s, {cores}")
            ideal = connections / (options.service_ms / 1e3)
            rows.append(
                [
                    "ingress",
                    f"{connections} connections",
                    f"{rate:.0f}",
                    f"{ideal:.0f} ideal",
                    cores,
                ]
            )
            results[str(connections)] = {"rate": rate, "cores": cores}
            samples.append(Sample(round=index, variant=f"ingress/{connections}", seconds=seconds))
    return Outcome(
        title=f"{options.service_ms} ms engines",
        headers=[],
        rows=rows,
        notes=["ingress: the load shares the machine's cores; ideal is connections / service time"],
        settings={},
        results=results,
        samples=samples,
    )


def _replicas(folder: Path, options: argparse.Namespace) -> Outcome:
    samples: list[Sample] = []
    counts = range(1, options.most_replicas + 1)
    fresh = _Posts(options.seed, options.retention, (224, 224))
    block_size = 4 * options.block
    with scaled(folder, "serving.engine:VllmEngine", 1, _ENVIRONMENT) as app:
        for index in range(max(2, options.rounds // 2)):
            order = list(counts) if index % 2 == 0 else list(reversed(counts))
            block = fresh.block(block_size)
            for count in order:
                app.scale(count)
                asyncio.run(_timed(app.url, fresh.block(8 * count), 8))  # warm
                seconds = asyncio.run(_timed(app.url, block, 16))
                progress(f"replicas round {index + 1}: {count} engines {seconds:.2f} s")
                samples.append(Sample(round=index, variant=f"replicas/{count}", seconds=seconds))
    times = by_variant(samples)
    rows: list[list[object]] = []
    for count in counts:
        ratio = paired_ratio(times["replicas/1"], times[f"replicas/{count}"])
        rate = block_size / median(times[f"replicas/{count}"])
        rows.append(["replicas", f"{count} engines", f"{rate:.1f}", str(ratio), ""])
    return Outcome(
        title="of the demo",
        headers=[],
        rows=rows,
        notes=["replicas: engines share the cores, so more of them cannot be faster than those"],
        settings={},
        results={str(row[1]): row[3] for row in rows},
        samples=samples,
    )
