"""The load generator as the bench sees it: process, plan, rows, and whether it kept up."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_TEXTS = ("a great day in the park", "very good with the new phone", "bad day", "a good phone")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of requests.csv; times in seconds after the start.

    Attributes:
        number: in the order of arrivals.
        phase: of the schedule.
        intended_s: when it was due.
        sent_s: when it was sent.
        done_s: when its answer was there.
        status: of HTTP; 0 without an answer.
        error: why it has none, or what a refusal said.
        is_dropped: it was not sent, since too many were in flight.
    """

    number: int
    phase: str
    intended_s: float
    sent_s: float
    done_s: float
    status: int
    error: str
    is_dropped: bool

    @property
    def seconds(self) -> float:
        """From when it was due to its answer."""
        return self.done_s - self.intended_s

    @property
    def lag_s(self) -> float:
        """How late it was sent."""
        return self.sent_s - self.intended_s


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
    """Schedule and bodies, each with an image of its own, encoded before the run."""
    plan = {
        "url": url,
        "path": "/v1/label",
        "arrivals": [(arrival.at_s, arrival.phase) for arrival in arrivals],
        "common": common,
        "most_in_flight": most_in_flight,
        "timeout_s": timeout_s,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    with (folder / "bodies.jsonl").open("w") as file:
        for number in range(len(arrivals)):
            image = picture_url(seed, number, (picture_size, picture_size))
            text = f"{_TEXTS[number % len(_TEXTS)]} {number}"
            file.write(json.dumps({"text": text, "image": image, **common}) + "\n")


class Generator:
    """The process that sends a plan.

    Args:
        folder: with the plan; the rows and a log go there too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "generator.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.locust_arrivals", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def start(self) -> float:
        """Starts the schedule once its bodies are read; returns when, since the epoch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(PermissionError):  # its clients would be on other machines
            os.setpriority(os.PRIO_PROCESS, self._process.pid, PRIORITY)
        if self._process.stdout.readline().strip() != "ready":
            self.stop()
            raise BenchError(f"the load generator did not start, see {self._folder}/generator.log")
        start_at = time.time() + START_IN_S
        self._process.stdin.write(f"{start_at}\n")
        self._process.stdin.flush()
        return start_at

    @property
    def is_done(self) -> bool:
        """Whether everything was sent and answered, or given up."""
        return self._process.poll() is not None

    def rows(self) -> list[Request]:
        """What became of each request, once it is done.

        Raises:
            BenchError: it failed.
        """
        if self._process.wait() != 0 or not (self._folder / "requests.csv").is_file():
            raise BenchError(f"the load generator failed, see {self._folder}/generator.log")
        return read_rows(self._folder / "requests.csv")

    def stop(self) -> None:
        """Ends it, whatever it does."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


def read_rows(path: Path) -> list[Request]:
    """The rows of a requests.csv."""
    with path.open(newline="") as file:
        return [
            Request(
                number=int(row["number"]),
                phase=row["phase"],
                intended_s=float(row["intended_s"]),
                sent_s=float(row["sent_s"]),
                done_s=float(row["done_s"]),
                status=int(row["status"]),
                error=row["error"],
                is_dropped=row["error"].startswith("dropped"),
            )
            for row in csv.DictReader(file)
        ]


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
