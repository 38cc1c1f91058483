"""Whether vLLM's `bench serve` measures of our server what our generator measures.

The same streamed chats go to the same server from both, in turns: at one rate with requests evenly
spaced, and in a closed loop with one number of connections. Latency is from when a request was
due, so waiting for a connection counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.batch_peer import STRUCTURE
from bench.contest import Body, Post
from bench.generator import CHAT, Planned, Request, Senders, Sending, void_reasons, write_requests
from bench.line_process import LineProcess
from bench.outcome import BenchError, progress
from bench.statistics import Estimate, interleaved, median, paired_ratio

OURS, OUTSIDE = "bench.generator", "bench serve"
OPEN, CLOSED = "open", "closed"
METRICS = ("posts/s", "median ms", "p90 ms")
TOLERANCE = 0.05
_TIMEOUT_S = 120.0
_MAX_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What both generators send.

    Attributes:
        url: of the server.
        base: checkpoint, whose tokenizer `bench serve` wants.
        model: model or adapter that is asked.
        rate: requests a second of the open loop.
        concurrency: connections.
    """

    url: str
    base: str
    model: str
    rate: float
    concurrency: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a generator says of one run."""

    posts_per_s: float
    median_ms: float
    p90_ms: float

    @classmethod
    def of(cls, due_s: Sequence[float], done_s: Sequence[float]) -> Figures:
        """From when each answered request was due, and when its answer was there."""
        seconds = np.asarray(done_s) - np.asarray(due_s)
        p50, p90 = 1e3 * np.percentile(seconds, (50, 90))
        span = max(done_s) - min(due_s)
        return cls(posts_per_s=len(due_s) / span, median_ms=float(p50), p90_ms=float(p90))

    def value(self, metric: str) -> float:
        """One of `METRICS`."""
        return dict(zip(METRICS, vars(self).values(), strict=True))[metric]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One metric of one load, by both.

    Attributes:
        load: open or closed.
        metric: of `METRICS`.
        ours: median over rounds.
        outside: likewise.
        ratio: outside's over ours, paired by round.
    """

    load: str
    metric: str
    ours: float
    outside: float
    ratio: Estimate

    @property
    def is_close(self) -> bool:
        """Whether noise explains the difference, or it is small whatever explains it."""
        within_noise = self.ratio.low <= 1 <= self.ratio.high
        return within_noise or abs(self.ratio.median - 1) <= TOLERANCE


def chat_body(model: str, post: Post) -> Body:
    """A label as a streamed chat, as `bench serve` sends it."""
    messages = [{"role": "user", "content": _content(post)}]
    limits = {"max_completion_tokens": _MAX_TOKENS, "stream": True}
    stream = {"stream_options": {"include_usage": True}}
    return {"model": model, "messages": messages, **limits, **stream, **_extra()}


def _content(post: Post) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": post.image}},
        {"type": "text", "text": STRUCTURE.prompt.replace("{text}", post.text)},
    ]


def _extra() -> Body:
    return {"temperature": 0.0, "label_structure": STRUCTURE.name, "retention_ratio": 1.0}


def serve_arguments(ask: Ask, load: str, posts: Path, count: int, seed: int) -> list[str]:
    """Of a run of `bench serve`."""
    rate = str(ask.rate) if load == OPEN else "inf"
    arguments = ["--backend", "openai-chat", "--base-url", ask.url, "--endpoint", CHAT]
    arguments += ["--model", ask.model, "--tokenizer", ask.base, "--request-rate", rate]
    arguments += ["--burstiness", "inf", "--max-concurrency", str(ask.concurrency)]
    arguments += ["--dataset-name", "custom_image", "--dataset-path", str(posts)]
    arguments += ["--num-prompts", str(count), "--disable-shuffle", "--seed", str(seed)]
    arguments += ["--custom-output-len", str(_MAX_TOKENS), "--extra-body", json.dumps(_extra())]
    return [*arguments, "--disable-tqdm", "--save-detailed"]  # else single requests are left out


def outside(
    process: LineProcess, ask: Ask, load: str, posts: Sequence[Post], folder: Path, seed: int
) -> Figures:
    """A run of `bench serve`.

    Raises:
        BenchError: it failed, or a request did.
    """
    path = folder / "posts.jsonl"
    path.write_text("".join(json.dumps({"content": _content(post)}) + "\n" for post in posts))
    answer = process.ask(json.dumps(serve_arguments(ask, load, path, len(posts), seed)))
    found: Mapping[str, Any] = json.loads(answer)
    if found["completed"] != len(posts):
        failed = next(filter(None, found["errors"]), "no reason given")
        raise BenchError(f"bench serve: {found['completed']} of {len(posts)} answered: {failed}")
    sent = np.asarray(found["start_times"])
    # All of a closed loop are due at once: what waits for a connection is not late.
    due = sent - np.asarray(found["queue_times"]) if load == OPEN else sent
    return Figures.of(due.tolist(), (sent + np.asarray(found["latencies"])).tolist())


def ours(senders: Senders, ask: Ask, load: str, posts: Sequence[Post], folder: Path) -> Figures:
    """A run of our generator.

    Raises:
        BenchError: a request failed, or the generator fell behind.
    """
    planned = [
        Planned(body=chat_body(ask.model, post), at_s=(number + 1) / ask.rate, id=str(number))
        for number, post in enumerate(posts)
    ]
    sending = Sending(
        url=ask.url,
        path=CHAT,
        loop="open" if load == OPEN else "closed",
        most_in_flight=ask.concurrency,
        timeout_s=_TIMEOUT_S,
    )
    write_requests(folder, planned, sending)
    rows = senders.send(folder)
    _check(rows, len(posts))
    return Figures.of([row.intended_s for row in rows], [row.done_s for row in rows])


def _check(rows: Sequence[Request], count: int) -> None:
    failed = [row.error for row in rows if row.status != 200]
    if failed or len(rows) < count:
        raise BenchError(f"our generator: {len(failed)} of {count} failed: {failed[:1]}")
    for reason in void_reasons(rows, count):
        progress(f"VOID: {reason}")


def compare(
    ask: Ask, fresh: Callable[[int], list[Post]], *, rounds: int, count: int, seed: int
) -> list[Agreement]:
    """Both generators in turns, each load in each round; every request has its own image."""
    found: dict[str, list[Figures]] = {}
    names = [f"{load}/{who}" for load in (OPEN, CLOSED) for who in (OURS, OUTSIDE)]
    with tempfile.TemporaryDirectory(prefix="sieve-agreement-") as name:
        folder = Path(name)
        process = LineProcess(["-m", "bench.outside_load"], folder / "bench-serve.log")
        with process, Senders(folder / "generator.log") as senders:
            for index, which in interleaved(names, 1 + rounds, seed):
                load, who = which.split("/")
                posts = fresh(count)
                figures = (
                    ours(senders, ask, load, posts, folder)
                    if who == OURS
                    else outside(process, ask, load, posts, folder, seed)
                )
                said = f"{figures.posts_per_s:7.2f}/s, median {figures.median_ms:.1f} ms"
                progress(f"agreement {index}/{rounds} {which:22} {said}")
                if index > 0:  # the first one warms both up
                    found.setdefault(which, []).append(figures)
    return list(agreements(found))


def agreements(found: Mapping[str, Sequence[Figures]]) -> Iterator[Agreement]:
    """Every load and metric; `found` has the rounds of each generator by `load/generator`."""
    for load in (OPEN, CLOSED):
        for metric in METRICS:
            mine, other = (
                [figures.value(metric) for figures in found[f"{load}/{who}"]]
                for who in (OURS, OUTSIDE)
            )
            ratio = paired_ratio(other, mine)
            yield Agreement(
                load=load, metric=metric, ours=median(mine), outside=median(other), ratio=ratio
            )
