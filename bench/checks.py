"""What all checks together cost: the server with keys, limits and image workers, and without.

Two servers with the same random checkpoint with CLIP-L/336's tower and a small decoder:

  on   a keys file with a concurrency and a rate limit, images decoded in worker processes,
       bounded queues (the defaults)
  off  no keys, images decoded in a thread (--image-workers 0), no bound on the engine's queue

Blocks of the same labels, with pictures never seen before, alternate between them in closed loop;
the ratio of a round is between two blocks with the same posts. --model demo measures the shipped
demo instead, whose requests are so small that checks weigh most.

Goal: >= 0.97 of the rate at the CLIP-L shape. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import yaml

from bench.contest import Body, closed_loop, make_text
from bench.fits import write_checkpoint, write_posts
from bench.flops import Shape
from bench.outcome import Outcome, positive, progress
from bench.pictures import picture_url
from bench.processes import Server, free_port, running
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio

GOAL = 0.97
ON, OFF = "on", "off"
DEMO, CLIP_L = "demo", "clip-l"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--model", choices=(CLIP_L, DEMO), default=CLIP_L, help=f"default {CLIP_L}")
    add("--rounds", type=positive, default=24, help="timed rounds (default 24)")
    add("--warmup", type=positive, default=2, help="rounds before, not counted (default 2)")
    add("--block", type=positive, default=12, help="requests in a block (default 12)")
    add("--concurrency", type=positive, default=4, help="requests at once (default 4)")
    add("--retention", type=float, default=0.4, help="of all requests (default 0.4)")
    add("--picture", type=positive, default=336, help="side of the pictures (default 336)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts both servers and lets them alternate."""
    with tempfile.TemporaryDirectory(prefix="sieve-checks-") as name:
        folder, key = Path(name), f"sieve-{secrets.token_urlsafe(32)}"
        model = _model(folder, options)
        servers = [_on(folder, model, key), _off(model)]
        with running(servers, folder):
            urls = {server.name: server.url for server in servers}
            samples = asyncio.run(_measure(urls, key, options))
    return summarise(samples, options)


def _model(folder: Path, options: argparse.Namespace) -> list[str]:
    if options.model == DEMO:
        return []
    progress("writing a checkpoint with CLIP-L/336's tower ...")
    posts = write_posts(folder / "posts", 32, options.seed)
    shape = Shape(layers=2, width=512, mlp=1376, heads=8)
    write_checkpoint(folder / "base", shape, posts, options.seed)
    return ["--model", str(folder / "base")]


def _on(folder: Path, model: Sequence[str], key: str) -> Server:
    digest = hashlib.sha256(key.encode()).hexdigest()
    entry = {"name": "bench", "sha256": digest, "max_concurrency": 1000, "per_minute": 1_000_000}
    keys = folder / "keys.yaml"
    keys.write_text(yaml.safe_dump([entry]))
    keys.chmod(0o600)
    return _server(ON, [*model, "--keys", str(keys)])


def _off(model: Sequence[str]) -> Server:
    return _server(OFF, [*model, "--image-workers", "0", "--max-queued-tokens", "0"])


def _server(name: str, arguments: Sequence[str]) -> Server:
    port = free_port()
    return Server(
        name=name,
        arguments=[
            *("-m", "serving", "--port", str(port), "--max-num-seqs", "16", "--no-prefix-caching"),
            *arguments,
        ],
        port=port,
        ready_path="/readyz",
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"},
    )


async def _measure(urls: dict[str, str], key: str, options: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    numbers = itertools.count()
    order = interleaved((ON, OFF), options.warmup + options.rounds, options.seed)
    for index, pair in itertools.groupby(order, key=lambda item: item[0]):
        block = [_post(next(numbers), options) for _ in range(options.block)]
        for _, side in pair:
            seconds = await _timed(urls[side], key, block, options.concurrency)
            counted = index - options.warmup
            progress(f"round {counted + 1}/{options.rounds} {side:3} {seconds:.2f} s")
            if counted >= 0:
                samples.append(Sample(round=counted, variant=side, seconds=seconds))
    return samples


def _post(number: int, options: argparse.Namespace) -> tuple[str, Body]:
    image = picture_url(options.seed, number, (options.picture, options.picture))
    text = make_text(options.seed, number)
    return "/v1/label", {"text": text, "image": image, "retention_ratio": options.retention}


async def _timed(url: str, key: str, block: Sequence[tuple[str, Body]], concurrency: int) -> float:
    """Both are sent the key: only one looks at it."""
    async with httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        timeout=600,
        limits=httpx.Limits(max_connections=concurrency),
        trust_env=False,
    ) as client:
        return await closed_loop(client, block, concurrency)


def summarise(samples: Sequence[Sample], options: argparse.Namespace) -> Outcome:
    """Rates with checks and without, and their paired ratio."""
    seconds = by_variant(samples)
    ratio = paired_ratio(seconds[OFF], seconds[ON])
    rates = {side: options.block / median(seconds[side]) for side in (ON, OFF)}
    verdict = "met" if ratio.median >= GOAL else "missed"
    return Outcome(
        title=f"Checks at {options.model}: {options.rounds} rounds of {options.block}, "
        f"{options.concurrency} connections, retention {options.retention:g}",
        headers=["checks", "posts/s", "on / off [95 %]"],
        rows=[
            [ON, f"{rates[ON]:.2f}", str(ratio)],
            [OFF, f"{rates[OFF]:.2f}", "1"],
        ],
        notes=[
            f"goal of {GOAL} of the rate without checks is {verdict}"
            + (", within noise" if ratio.low < GOAL <= ratio.high else ""),
            "both servers run; the idle one does nothing",
        ],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={"rates": rates, "ratio": vars(ratio)},
        samples=samples,
    )
