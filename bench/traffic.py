"""Load on any running server: open loop by a schedule, closed loop, or up to saturation.

Sends labels (or, with --stream, chats) to a server at URL with Locust, from processes of its own.
Bodies are encoded before the clock starts; every request is a row of requests.csv: id, adapter,
ratio, structure, selector, when it was due, sent, first byte, done, status, kept tokens, labels.

  open        requests go out when a seeded schedule says (--profile, --spacing), whatever became of
              those before; latency counts from when a request was due. More than --in-flight at
              once are dropped and counted.
  closed      --connections, each sending its next request when one is answered: what a batch job
              does. Latency counts from sending, so it hides what an open loop shows.
  saturation  closed loops of 1, 2, 4, ... connections until the rate stops rising

Goal: a run that counts. It is void if the generator fell behind: its p99 lag is over 5 % of the
median latency, or it sent under 98 % of what was due. A percentile stands there only if enough
answers are behind it: 64 for p90, 130 for p95, 662 for p99. For Locust's web UI see
bench/locustfile.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np

from bench import mix, profiles
from bench.generator import (
    CHAT,
    LABEL,
    Planned,
    Request,
    Senders,
    Sending,
    void_reasons,
    write_requests,
    write_rows,
)
from bench.latency import percentile_ms
from bench.outcome import BenchError, Outcome, positive, progress
from bench.statistics import Sample
from bench.tables import markdown_table
from serving.client_key import bearer_headers

HEADERS = (
    *("phase", "asked/s", "sent/s", "ok/s", "n", "p50", "p90", "p95", "p99"),
    *("first byte p50", "failed", "429", "503", "dropped"),
)
ASKED = ("adapter", "ratio", "structure", "selector")
GAIN = 1.05
"""Twice as many connections must give so many times the rate, or the server is saturated."""
_MOST_CONNECTIONS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("url", help="of the server, such as http://127.0.0.1:8000")
    add = parser.add_argument
    add("--mode", choices=MODES, default="open", help="default open")
    add("--connections", type=positive, default=16, help="of a closed loop (default 16)")
    add("--seconds", type=positive, default=20, help="of each closed loop (default 20)")
    add("--processes", type=positive, default=1, help="that send (default 1)")
    add("--stream", action="store_true", help="chats, streamed: time to the first token")
    add("--in-flight", type=positive, default=1000, help="most at once; more are dropped (1000)")
    add("--timeout-s", type=positive, default=120, help="until a request is given up (120)")
    add("--keep", type=Path, help="existing folder for requests.csv (default a fresh one)")
    profiles.add_arguments(parser, default="constant")
    mix.add_arguments(parser)


def run(options: argparse.Namespace) -> Outcome:
    """Sends the load and sums it up."""
    if options.keep is not None and not options.keep.is_dir():
        raise BenchError(f"--keep {options.keep}: no such folder")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="sieve-load-"))
    chat_model = base_model(options.url) if options.stream else None
    posts = mix.contents(options)
    asked = mix.bodies(posts, mix.mix_of(options), options.seed, chat_model)
    path = CHAT if options.stream else LABEL
    sending = Sending(url=options.url.rstrip("/"), path=path, timeout_s=options.timeout_s)
    with Senders(folder / "generator.log", options.processes) as senders:
        rows, due = MODES[options.mode](options, folder, senders, sending, asked)
    write_rows(folder / "requests.csv", rows)
    progress(f"every request: {folder / 'requests.csv'}")
    return summarise(rows, due, options)


def base_model(url: str) -> str:
    """Name of a server's base model.

    Raises:
        BenchError: there is no server, or not one of ours.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=bearer_headers(), timeout=30)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{url}: no list of models there ({error!r}); is it running?") from error


Asked = Iterator[tuple[str, dict[str, object]]]
Found = tuple[list[Request], dict[str, tuple[int, float]]]
"""Rows, and requests that were due and seconds, by phase."""


def _open(
    options: argparse.Namespace, folder: Path, senders: Senders, sending: Sending, asked: Asked
) -> Found:
    phases = profiles.PROFILES[options.profile](options)
    arrivals = profiles.schedule(phases, options.seed, options.spacing, options.burstiness)
    if not arrivals:
        raise BenchError("this profile has no request: more seconds, or a higher rate")
    planned = (
        Planned(body=body, at_s=arrival.at_s, phase=arrival.phase, id=post)
        for arrival, (post, body) in zip(arrivals, asked, strict=False)
    )
    progress(f"encoding {len(arrivals)} requests ...")
    write_requests(folder, planned, replace(sending, most_in_flight=options.in_flight))
    seconds = sum(phase.seconds for phase in phases)
    progress(f"sending for {seconds:.0f} s ...")
    rows = senders.send(folder)
    names = [arrival.phase for arrival in arrivals]
    return rows, {phase.name: (names.count(phase.name), phase.seconds) for phase in phases}


def _closed(
    options: argparse.Namespace, folder: Path, senders: Senders, sending: Sending, asked: Asked
) -> Found:
    rows = closed_loop(options, folder, senders, sending, asked, options.connections, 200)
    return rows, {_phase(options.connections): (len(rows), _span(rows))}


def _saturation(
    options: argparse.Namespace, folder: Path, senders: Senders, sending: Sending, asked: Asked
) -> Found:
    rows: list[Request] = []
    due: dict[str, tuple[int, float]] = {}
    best, guess = 0.0, 100.0
    for connections in itertools.takewhile(
        lambda n: n <= _MOST_CONNECTIONS, (2**power for power in itertools.count())
    ):
        found = closed_loop(options, folder, senders, sending, asked, connections, guess)
        rows += found
        due[_phase(connections)] = (len(found), _span(found))
        rate = sum(row.status == 200 for row in found) / _span(found)
        progress(f"{connections:4} connections: {rate:.1f}/s")
        if rate < GAIN * best:
            break
        best, guess = rate, 2.5 * rate
    return rows, due


def closed_loop(
    options: argparse.Namespace,
    folder: Path,
    senders: Senders,
    sending: Sending,
    asked: Asked,
    connections: int,
    guess: float,
) -> list[Request]:
    """So many connections for the time asked; `guess` is how many a second they may need."""
    count = int(guess * options.seconds) + connections
    phase = _phase(connections)
    planned = (
        Planned(body=body, phase=phase, id=post) for post, body in itertools.islice(asked, count)
    )
    seconds = float(options.seconds)
    write_requests(
        folder,
        planned,
        replace(sending, loop="closed", most_in_flight=connections, seconds=seconds),
    )
    return senders.send(folder)


def _phase(connections: int) -> str:
    return f"{connections} connections"


def _span(rows: Sequence[Request]) -> float:
    """Seconds from the first request to the last answer."""
    if not rows:
        return 1.0
    return max(row.done_s for row in rows) - min(row.sent_s for row in rows)


MODES: dict[str, Callable[..., Found]] = {
    "open": _open,
    "closed": _closed,
    "saturation": _saturation,
}


def summarise(
    rows: Sequence[Request], due: dict[str, tuple[int, float]], options: argparse.Namespace
) -> Outcome:
    """A row a phase; below, one a combination of what was asked."""
    by_phase = {name: [row for row in rows if row.phase == name] for name in due}
    cells = [_phase_row(name, by_phase[name], *due[name]) for name in due]
    void = void_reasons(rows, sum(count for count, _ in due.values()))
    return Outcome(
        title=("VOID: " if void else "") + f"Load: {options.mode} loop, {len(rows)} requests",
        headers=HEADERS,
        rows=[["-" if cell is None else cell for cell in row] for row in cells],
        notes=_notes(rows, void, options),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            "void": void,
            "phases": [dict(zip(HEADERS, row, strict=True)) for row in cells],
            "asked": [dict(zip(_ASKED_HEADERS, row, strict=True)) for row in _asked_rows(rows)],
            "requests": [asdict(row) for row in rows],
        },
        samples=[
            Sample(round=row.number, variant=row.phase, seconds=row.seconds)
            for row in rows
            if row.status == 200
        ],
    )


def _phase_row(
    name: str, rows: Sequence[Request], num_due: int, seconds: float
) -> list[object | None]:
    sent = [row for row in rows if not row.is_dropped]
    answered = [row for row in sent if row.status == 200]
    refused = {code: sum(row.status == code for row in sent) for code in (429, 503)}
    first = [row.first_byte_seconds for row in answered if row.first_byte_seconds is not None]
    rates = [round(count / seconds, 1) for count in (num_due, len(sent), len(answered))]
    return [
        name,
        *rates,
        len(answered),
        *(_ms([row.seconds for row in answered], percent) for percent in (50, 90, 95, 99)),
        _ms(first, 50),
        len(sent) - len(answered) - sum(refused.values()),
        refused[429],
        refused[503],
        len(rows) - len(sent),
    ]


def _ms(seconds: Sequence[float], percent: float) -> float | None:
    found = percentile_ms(seconds, percent)
    return None if found is None else round(found, 1)


_ASKED_HEADERS = (*ASKED, "n", "failed", "p50", "p95", "kept", "prompt tokens")


def _asked_rows(rows: Sequence[Request]) -> list[list[object]]:
    sent = [row for row in rows if not row.is_dropped]
    groups: dict[tuple[str, ...], list[Request]] = {}
    for row in sent:
        key = tuple(str(getattr(row, name) or "-") for name in ASKED)
        groups.setdefault(key, []).append(row)
    return [[*key, *_asked_cells(groups[key])] for key in sorted(groups)]


def _asked_cells(rows: Sequence[Request]) -> list[object]:
    answered = [row for row in rows if row.status == 200]
    seconds = [row.seconds for row in answered]
    means = [
        np.mean(values).round(1).item() if values else None
        for values in (
            [row.kept for row in answered if row.kept is not None],
            [row.prompt_tokens for row in answered if row.prompt_tokens is not None],
        )
    ]
    percentiles = [_ms(seconds, 50), _ms(seconds, 95)]
    return [len(answered), len(rows) - len(answered), *percentiles, *means]


def _notes(rows: Sequence[Request], void: Sequence[str], options: argparse.Namespace) -> list[str]:
    since = "sending" if options.mode != "open" else "when a request was due"
    notes = [f"VOID, the generator fell behind: {reason}" for reason in void]
    notes.append(f"milliseconds from {since}; `-` where too few answers are behind a percentile")
    lag = [row.lag_s for row in rows if not row.is_dropped]
    if lag and options.mode == "open":
        notes.append(f"p99 of the generator's lag: {1e3 * float(np.percentile(lag, 99)):.1f} ms")
    failed = {row.error for row in rows if not row.is_dropped and row.status != 200} - {""}
    notes += [f"failed: {error}" for error in sorted(failed)[:5]]
    cells = [["-" if cell is None else cell for cell in row] for row in _asked_rows(rows)]
    return [*notes, f"by what was asked:\n\n{markdown_table(_ASKED_HEADERS, cells)}"]


def labels_of(row: Request) -> dict[str, str]:
    """The labels that a request was answered with; none where it was not."""
    if row.status != 200 or not row.label.startswith("{"):
        return {}
    found: dict[str, str] = json.loads(row.label)
    return found
