"""Engines on Ray that follow a load: ramp up, plateau, ramp down, and what was decided why.

Starts `python -m serving --ray` with a range of replicas (or takes --server), and sends labels from
a process of Locust's by a seeded schedule that waits for no answer; latency counts from when a
request was due. Meanwhile /metrics is read once a second.

  ramp      low, up, high, down, low: from the fewest engines to the most and back
  constant  one rate
  step      plateaus of rising rate
  trace     when the requests of a file were due
  once      silence, one request, silence; with --replicas 0-2: from zero engines to one and back

Goal: as many engines as the load needs, within what an engine takes to start; back to the fewest
afterwards; no failed request, and refusals only as 429 or 503. The run is void if the generator
fell behind: its p99 lag is over 5 % of the median latency, or it sent under 98 % of what was due.
Demo engines on one machine share its cores: more of them are not faster, they show the decisions.
--keep FOLDER keeps a CSV row of every request and the server's log.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import profiles
from bench.generator import Generator, Request, void_reasons, write_plan
from bench.outcome import BenchError, Outcome, positive, progress
from bench.processes import Server, free_port, running
from bench.profiles import PROFILES, Arrival, Phase, schedule
from bench.ramp_plot import PLOT_KINDS, draw, load_matplotlib
from bench.statistics import Sample
from bench.tables import markdown_table
from bench.watch import Event, Look, Watch, events
from serving.settings import DEMO

HEADERS = (
    *("phase", "seconds", "asked/s", "sent/s", "ok/s", "replicas", "target"),
    *("p50", "p95", "n", "failed", "429", "503", "dropped"),
)
MIN_P95 = 40
"""A p95 of fewer has less than two answers above it."""
_SHOW_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    profiles.add_arguments(parser, default="ramp")
    add = parser.add_argument
    add("--model", help="model or adapter that requests name (default the base model)")
    add("--retention", type=float, default=1.0, help="share of visual tokens kept (default 1.0)")
    add("--picture-size", type=positive, default=224, help="pixels of a side (default 224)")
    add("--in-flight", type=positive, default=1000, help="most at once; more are dropped (1000)")
    add("--timeout-s", type=positive, default=120, help="until a request is given up (120)")
    add("--plot", type=Path, help="write load, replicas, queue wait and p95 there (.png, .svg)")
    add("--keep", type=Path, help="existing folder for logs and requests.csv (default a fresh one)")
    server = parser.add_argument_group("server", "ignored with --server, but for --server")
    add = server.add_argument
    add("--server", help="URL of a server that runs, instead of starting one")
    add("--checkpoint", default=str(DEMO / "base"), help="checkpoint folder (default the demo)")
    add("--replicas", default="1-3", help="engines, least-most (default 1-3)")
    add("--ray-cpus", type=positive, default=8, help="CPUs that Ray believes in (default 8)")
    add("--max-num-seqs", type=positive, default=8, help="requests in an engine (default 8)")
    add("--tokens-per-replica", type=float, default=200.0, help="in flight (default 200)")
    add("--target-wait-s", type=float, default=1.0, help="wait for an engine (default 1)")
    add("--downscale-delay-s", type=float, default=10.0, help="seconds (default 10)")
    add("--zero-delay-s", type=float, default=10.0, help="seconds until zero (default 10)")


def run(options: argparse.Namespace) -> Outcome:
    """Starts what is to be started, sends the load, and stops everything."""
    _check(options)
    phases = PROFILES[options.profile](options)
    arrivals = schedule(phases, options.seed, options.spacing, options.burstiness)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="sieve-ramp-"))
    with _served(options, folder) as url:
        start_at, rows, looks = _measure(options, folder, url, phases, arrivals)
    outcome = summarise(options, phases, arrivals, rows, looks)
    progress(f"every request: {folder / 'requests.csv'}")
    if options.plot is not None:
        title = f"{outcome.title}, started {time.strftime('%F %T', time.gmtime(start_at))} UTC"
        draw(options.plot, title, phases, rows, looks)
        progress(f"plot: {options.plot}")
    return outcome


def _check(options: argparse.Namespace) -> None:
    if options.keep is not None and not options.keep.is_dir():
        raise BenchError(f"--keep {options.keep}: no such folder")
    if options.low > options.high:
        raise BenchError(f"--low {options.low:g} is above --high {options.high:g}")
    if options.server is None and not (Path(options.checkpoint) / "config.json").is_file():
        raise BenchError(f"--checkpoint {options.checkpoint}: no config.json there")
    if options.plot is not None:
        if options.plot.suffix not in PLOT_KINDS:
            raise BenchError(f"--plot {options.plot}: must end with {' or '.join(PLOT_KINDS)}")
        if not options.plot.resolve().parent.is_dir():
            raise BenchError(f"--plot {options.plot}: its folder does not exist")
        load_matplotlib()


@contextlib.contextmanager
def _served(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The URL of a server that answers."""
    if options.server is not None:
        with running([], folder):  # SIGTERM ends the generator too
            yield options.server.rstrip("/")
        return
    server = ray_server(options)
    with running([server], folder):
        yield server.url


def ray_server(options: argparse.Namespace) -> Server:
    """`python -m serving --ray` with a range of replicas."""
    port = free_port()
    flags = {
        "model": options.checkpoint,
        "port": port,
        "replicas": options.replicas,
        "ray-cpus": options.ray_cpus,
        "max-num-seqs": options.max_num_seqs,
        "visual-tokens-per-replica": options.tokens_per_replica,
        "target-wait-s": options.target_wait_s,
        "downscale-delay-s": options.downscale_delay_s,
        "zero-delay-s": options.zero_delay_s,
    }
    arguments = ["-m", "serving", "--ray"]
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # an idle engine's threads do not spin on others' cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return Server(
        name="ray", arguments=arguments, port=port, ready_path="/readyz", environment=environment
    )


def _measure(
    options: argparse.Namespace,
    folder: Path,
    url: str,
    phases: Sequence[Phase],
    arrivals: Sequence[Arrival],
) -> tuple[float, list[Request], list[Look]]:
    common: dict[str, Any] = {"retention_ratio": options.retention}
    if options.model is not None:
        common["model"] = options.model
    write_plan(
        folder,
        url,
        arrivals,
        common,
        seed=options.seed,
        picture_size=options.picture_size,
        most_in_flight=options.in_flight,
        timeout_s=options.timeout_s,
    )
    generator = Generator(folder)
    try:
        start_at = generator.start()
        end_at = start_at + sum(phase.seconds for phase in phases)
        with Watch(url, start_at) as watch:
            while time.time() < end_at or not generator.is_done:
                time.sleep(min(_SHOW_EVERY_S, max(0.5, end_at - time.time())))
                _show(watch.looks)
        return start_at, generator.rows(), watch.looks
    finally:
        generator.stop()


def _show(looks: Sequence[Look]) -> None:
    if looks:
        look = looks[-1]
        progress(
            f"{look.at_s:6.0f} s  replicas {look.running}/{look.target}  pending "
            f"{look.pending:.0f}  tokens {look.visual_tokens:.0f}  wait {look.queue_wait_s:.2f} s"
        )


def summarise(
    options: argparse.Namespace,
    phases: Sequence[Phase],
    arrivals: Sequence[Arrival],
    rows: Sequence[Request],
    looks: Sequence[Look],
) -> Outcome:
    """A row a phase, every decision below."""
    begins = np.cumsum([0.0, *(phase.seconds for phase in phases)])
    cells = [
        _phase_row(phase, float(begin), arrivals, rows, looks)
        for phase, begin in zip(phases, begins, strict=False)
    ]
    happened = [event for event in events(looks) if event.at_s >= 0]
    void = void_reasons(rows, len(arrivals))
    title = f"Replicas under load: {options.profile}, {len(arrivals)} requests, {options.spacing}"
    return Outcome(
        title=("VOID: " if void else "") + title,
        headers=HEADERS,
        rows=cells,
        notes=_notes(void, rows, looks, happened),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            "void": void,
            "phases": [dict(zip(HEADERS, row, strict=True)) for row in cells],
            "events": [asdict(event) for event in happened],
            "looks": [asdict(look) for look in looks],
            "requests": [asdict(row) for row in rows],
        },
        samples=[
            Sample(round=row.number, variant=row.phase, seconds=row.seconds)
            for row in rows
            if row.status == 200
        ],
    )


def _phase_row(
    phase: Phase,
    begin_s: float,
    arrivals: Sequence[Arrival],
    rows: Sequence[Request],
    looks: Sequence[Look],
) -> list[object]:
    """Requests by when they were due, answers per second by when they came."""
    end_s = begin_s + phase.seconds
    due = [row for row in rows if row.phase == phase.name]
    sent = [row for row in due if not row.is_dropped]
    seconds = [row.seconds for row in sent if row.status == 200]
    came = [row for row in rows if row.status == 200 and begin_s <= row.done_s < end_s]
    seen = [look for look in looks if begin_s <= look.at_s < end_s]
    refused = {code: sum(row.status == code for row in sent) for code in (429, 503)}
    num_due = sum(arrival.phase == phase.name for arrival in arrivals)
    rates = [f"{len(each) / phase.seconds:.1f}" for each in (sent, came)]
    return [
        phase.name,
        f"{phase.seconds:g}",
        f"{num_due / phase.seconds:.1f}",
        *rates,
        _span([look.running for look in seen]),
        _span([look.target for look in seen]),
        _milliseconds(seconds, 50, 1),
        _milliseconds(seconds, 95, MIN_P95),
        len(seconds),
        len(sent) - len(seconds) - sum(refused.values()),
        refused[429],
        refused[503],
        len(due) - len(sent),
    ]


def _span(counts: Sequence[int]) -> str:
    """The first, and each that differs from the one before."""
    changed = [n for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]]
    return " ".join(map(str, changed)) or "-"


def _milliseconds(seconds: Sequence[float], percent: float, least: int) -> str:
    if len(seconds) < least:
        return "-"
    return f"{1e3 * float(np.percentile(seconds, percent)):.0f}"


def _notes(
    void: Sequence[str],
    rows: Sequence[Request],
    looks: Sequence[Look],
    happened: Sequence[Event],
) -> list[str]:
    lag = [row.lag_s for row in rows if not row.is_dropped]
    notes = [f"VOID, the generator fell behind: {reason}" for reason in void]
    notes.append("p50 and p95 in ms, from when a request was due; ok/s by when answers came")
    if lag:
        notes.append(f"p99 of the generator's lag: {1e3 * float(np.percentile(lag, 99)):.1f} ms")
    notes.append(f"/metrics was read {len(looks)} times")
    failed = sorted(
        {row.error for row in rows if not row.is_dropped and row.status not in (200, 429, 503)}
        - {""}
    )
    notes += [f"failed: {error}" for error in failed[:5]]
    return [*notes, f"what happened, by the second:\n\n{_event_table(happened)}"]


def _event_table(happened: Sequence[Event]) -> str:
    headers = ["second", "what", "reason", "visual tokens", "queue wait s"]
    cells = [
        [
            f"{event.at_s:.0f}",
            event.what,
            event.reason,
            f"{event.visual_tokens:.0f}",
            f"{event.queue_wait_s:.2f}",
        ]
        for event in happened
    ]
    return markdown_table(headers, cells)
