"""The load generator as the bench sees it: plan, processes that send, rows, did it keep up."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.outcome import BenchError
from bench.pictures import picture_url
from bench.profiles import Arrival

START_IN_S = 1.0
STOP_TIMEOUT_S = 10.0
PRIORITY = -10
#: The generator's lag may be so much of the median latency.
LAG_SHARE = 0.05
SENT_SHARE = 0.98
LABEL, CHAT = "/v1/label", "/v1/chat/completions"
_TEXTS = ("a great day in the park", "very good with the new phone", "bad day", "a good phone")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of requests.csv; times in seconds after the start.

    Attributes:
        number: in the order of arrivals.
        id: of its post.
        phase: of the schedule.
        adapter: model that answered; that was asked where none did.
        ratio: retention ratio, as `adapter`.
        structure: label structure, as `adapter`.
        selector: as `adapter`.
        intended_s: when it was due; in closed loop when it was sent.
        sent_s: when it was sent.
        first_byte_s: when the first byte of its answer's body was there.
        done_s: when its answer was there.
        status: of HTTP; 0 without an answer.
        kept: visual tokens that the model read.
        prompt_tokens: all tokens that it read.
        label: the answered labels as a JSON object by field; of a chat its text.
        retry_after: what a refusal said of when to come again.
        error: why it has none, or what a refusal said.
        is_dropped: it was not sent, since too many were in flight.
    """

    number: int
    id: str = ""
    phase: str
    adapter: str = ""
    ratio: float | None = None
    structure: str = ""
    selector: str = ""
    intended_s: float
    sent_s: float
    first_byte_s: float | None = None
    done_s: float
    status: int
    kept: int | None = None
    prompt_tokens: int | None = None
    label: str = ""
    retry_after: str = ""
    error: str
    is_dropped: bool

    @property
    def seconds(self) -> float:
        """From when it was due to its answer."""
        return self.done_s - self.intended_s

    @property
    def first_byte_seconds(self) -> float | None:
        """From when it was due to the first byte of its answer."""
        return None if self.first_byte_s is None else self.first_byte_s - self.intended_s

    @property
    def lag_s(self) -> float:
        """How late it was sent."""
        return self.sent_s - self.intended_s


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request to be sent.

    Attributes:
        body: its JSON.
        at_s: when it is due; of no meaning in closed loop.
        phase: of the schedule.
        id: of its post.
    """

    body: dict[str, Any]
    at_s: float = 0.0
    phase: str = ""
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Sending:
    """How a plan is sent.

    Attributes:
        url: of the server.
        path: of the requests.
        loop: `open` sends when due; `closed` keeps `most_in_flight` connections busy.
        most_in_flight: more that are due are dropped and counted.
        timeout_s: until a request is given up.
        seconds: a closed loop starts no request after that; 0 for no such end.
    """

    url: str
    path: str = LABEL
    loop: Literal["open", "closed"] = "open"
    most_in_flight: int = 1000
    timeout_s: float = 120.0
    seconds: float = 0.0


def write_requests(folder: Path, planned: Iterable[Planned], sending: Sending) -> int:
    """Writes a plan: what to send how, each body encoded now; returns how many there are."""
    requests = []
    with (folder / "bodies.jsonl").open("w") as file:
        for each in planned:
            file.write(json.dumps(each.body) + "\n")
            names = ("model", "retention_ratio", "label_structure", "selector")
            asked = [each.body.get(name) for name in names]
            requests.append([each.at_s, each.phase, each.id, *asked])
    plan = {**asdict(sending), "requests": requests}
    (folder / "plan.json").write_text(json.dumps(plan))
    return len(requests)


def write_plan(
    folder: Path,
    url: str,
    arrivals: Sequence[Arrival],
    common: dict[str, Any],
    *,
    seed: int,
    picture_size: int,
    most_in_flight: int,
    timeout_s: float,
) -> None:
    """A plan of labels that are all alike but for their post, each with an image of its own."""
    size = (picture_size, picture_size)
    planned = (
        Planned(
            body={
                "text": f"{_TEXTS[number % len(_TEXTS)]} {number}",
                "image": picture_url(seed, number, size),
                **common,
            },
            at_s=arrival.at_s,
            phase=arrival.phase,
            id=str(number),
        )
        for number, arrival in enumerate(arrivals)
    )
    sending = Sending(url=url, most_in_flight=most_in_flight, timeout_s=timeout_s)
    write_requests(folder, planned, sending)


class Senders:
    """Processes that send plans, one plan after the other.

    Args:
        log: file for what they say.
        num_processes: a plan is split among them; their rows are merged.
    """

    def __init__(self, log: Path, num_processes: int = 1) -> None:
        self._log_path, self._log = log, log.open("wb")
        self._folder = log.parent
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.locust_arrivals", str(index), str(num_processes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,
            )
            for index in range(num_processes)
        ]
        for process in self._processes:
            with contextlib.suppress(PermissionError):  # its clients would be on other machines
                os.setpriority(os.PRIO_PROCESS, process.pid, PRIORITY)

    def __enter__(self) -> Senders:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, folder: Path) -> float:
        """Starts a folder's plan once its bodies are read; returns when, since the epoch."""
        self._folder = folder
        for path in self._row_files():
            path.unlink(missing_ok=True)
        self._say(json.dumps(str(folder)))
        self._hear("ready")
        start_at = time.time() + START_IN_S
        self._say(str(start_at))
        return start_at

    @property
    def is_done(self) -> bool:
        """Whether everything was sent and answered, or given up."""
        files = zip(self._processes, self._row_files(), strict=True)
        return all(path.exists() or process.poll() is not None for process, path in files)

    def rows(self) -> list[Request]:
        """What became of each request of the plan, once it is done; also in its requests.csv.

        Raises:
            BenchError: a process failed.
        """
        self._hear("done")
        found = [row for path in self._row_files() for row in read_rows(path)]
        found.sort(key=lambda row: row.number)
        write_rows(self._folder / "requests.csv", found)
        return found

    def send(self, folder: Path) -> list[Request]:
        """Sends a folder's plan and waits for its end."""
        self.start(folder)
        return self.rows()

    def stop(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._processes:
            _end(process)
        self._log.close()

    def _row_files(self) -> list[Path]:
        return [self._folder / f"requests-{index}.csv" for index in range(len(self._processes))]

    def _say(self, line: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `_hear` says what is wrong
                process.stdin.write(f"{line}\n")
                process.stdin.flush()

    def _hear(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != word:
                raise BenchError(f"the load generator failed, see {self._log_path}")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Generator:
    """Sends one plan.

    Args:
        folder: with the plan; the rows and a log go there too.
        num_processes: that send it.
    """

    def __init__(self, folder: Path, num_processes: int = 1) -> None:
        self._folder = folder
        self._senders = Senders(folder / "generator.log", num_processes)

    def start(self) -> float:
        """Starts the schedule once its bodies are read; returns when, since the epoch."""
        return self._senders.start(self._folder)

    @property
    def is_done(self) -> bool:
        """Whether everything was sent and answered, or given up."""
        return self._senders.is_done

    def rows(self) -> list[Request]:
        """What became of each request, once it is done.

        Raises:
            BenchError: it failed.
        """
        return self._senders.rows()

    def stop(self) -> None:
        """Ends it, whatever it does."""
        self._senders.stop()


COLUMNS = tuple(field.name for field in fields(Request) if field.name != "is_dropped")
_WHOLE, _REAL = ("number", "status", "kept", "prompt_tokens"), ("ratio",)


def read_rows(path: Path) -> list[Request]:
    """The rows of a requests.csv."""
    with path.open(newline="") as file:
        return [_request(row) for row in csv.DictReader(file)]


def _request(row: dict[str, str]) -> Request:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        text = row[name]
        if name in _WHOLE:
            values[name] = int(text) if text else None
        elif name in _REAL or name.endswith("_s"):
            values[name] = float(text) if text else None
        else:
            values[name] = text
    return Request(**values, is_dropped=row["error"].startswith("dropped"))


def write_rows(path: Path, rows: Iterable[Request]) -> None:
    """Writes a requests.csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def void_reasons(rows: Sequence[Request], num_due: int) -> list[str]:
    """Why the run says nothing about the server: the generator itself fell behind."""
    sent = [row for row in rows if not row.is_dropped]
    reasons = []
    if len(sent) < SENT_SHARE * num_due:
        reasons.append(f"{len(sent)} of {num_due} requests were sent, under {SENT_SHARE:.0%}")
    answered = [row.seconds for row in sent if row.status == 200]
    if answered:
        lag_s = float(np.percentile([row.lag_s for row in sent], 99))
        allowed_s = LAG_SHARE * float(np.median(answered))
        if lag_s > allowed_s:
            reasons.append(
                f"p99 of the generator's lag is {1e3 * lag_s:.1f} ms, over {LAG_SHARE:.0%} of the "
                f"median latency ({1e3 * allowed_s:.1f} ms)"
            )
    else:
        reasons.append("no request was answered")
    return reasons
