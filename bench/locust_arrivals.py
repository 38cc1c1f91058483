"""Sends plans with Locust: one greenlet a request, each at its time.

A process of its own (`python -m bench.locust_arrivals INDEX COUNT`), because importing Locust
patches sockets, threads and time for gevent. On stdin it gets a folder (as JSON), reads its
plan.json and every COUNT-th body of bodies.jsonl from INDEX on, says `ready`, gets the start
(seconds since the epoch), writes requests-INDEX.csv, says `done`, and gets the next folder.
Locust's own waits are closed-loop and its percentiles have two digits: only its user and HTTP
client are used here. bench/locustfile.py is for its web UI.
"""

from __future__ import annotations

import csv
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.generator import COLUMNS
from serving.client_key import bearer_headers

DROPPED = "dropped: too many in flight"
_LAST_WORDS_S = 5.0
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}

Row = dict[str, Any]


class Plan:
    """This process's share of what to send.

    Args:
        folder: with plan.json and bodies.jsonl.
        index: of this process.
        count: of processes.
    """

    def __init__(self, folder: Path, index: int, count: int) -> None:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        self.url: str = plan["url"]
        self.path: str = plan["path"]
        self.is_open = plan["loop"] == "open"
        self.requests: list[list[Any]] = plan["requests"]
        self.numbers = range(index, len(self.requests), count)
        self.most_in_flight = share_of(plan["most_in_flight"], index, count)
        self.timeout_s: float = plan["timeout_s"]
        self.seconds: float = plan["seconds"]
        with (folder / "bodies.jsonl").open("rb") as file:
            mine = itertools.islice(file, index, None, count)
            self.bodies = dict(zip(self.numbers, mine, strict=True))

    def row(self, number: int, sent_s: float, done_s: float) -> Row:
        """What is known without an answer."""
        at_s, phase, post, adapter, ratio, structure, selector = self.requests[number]
        intended_s = at_s if self.is_open else sent_s
        times = {"intended_s": intended_s, "sent_s": sent_s, "done_s": done_s}
        asked = {"adapter": adapter, "ratio": ratio, "structure": structure, "selector": selector}
        known = {"number": number, "id": post, "phase": phase, "status": 0, **asked}
        return known | {key: round(value, 6) for key, value in times.items()}


def share_of(total: int, index: int, count: int) -> int:
    """A process's part of a number that is split as evenly as it goes, at least 1."""
    return max(1, total // count + (index < total % count))


@dataclass(frozen=True, kw_only=True)
class Call:
    """What came back.

    Attributes:
        first_at: when the body's first byte was there, monotonic; None without a body.
        done_at: when all of it was.
        status: of HTTP; 0 without an answer.
        text: the body, or why there is none.
        retry_after: of a refusal.
    """

    first_at: float | None
    done_at: float
    status: int
    text: str
    retry_after: str | None = None


def call(client: Any, path: str, body: bytes, name: str | None = None) -> Call:
    """Posts a body with Locust's fast client and reads the answer as it comes."""
    headers = {**_HEADERS, **bearer_headers()}
    # Redirects are followed by default, which costs nothing; switching it off is not safe with
    # several greenlets.
    response = client.request("POST", path, name=name, data=body, headers=headers, stream=True)
    first_at = None
    status, error = response.status_code or 0, getattr(response, "error", None)
    if status == 0:
        return Call(first_at=None, done_at=time.monotonic(), status=0, text=str(error))
    try:
        first = response.read(1)
        first_at = time.monotonic()
        text = (first + response.read()).decode("utf-8", "replace")
    except OSError as broken:
        return Call(first_at=first_at, done_at=time.monotonic(), status=0, text=repr(broken))
    retry_after = (response.headers or {}).get("retry-after")
    done_at = time.monotonic()
    return Call(
        first_at=first_at, done_at=done_at, status=status, text=text, retry_after=retry_after
    )


def read(found: Call) -> Row:
    """Status and what the answer says; status 0 when there was none."""
    if found.status != 200:
        error = " ".join(found.text.split())[:300]
        return {"status": found.status, "retry_after": found.retry_after, "error": error}
    try:
        is_stream = found.text.startswith("data:")
        said: Row = _read_stream(found.text) if is_stream else _read_body(json.loads(found.text))
    except (KeyError, TypeError, ValueError, IndexError):
        said = {"error": "not a label's or a chat's answer"}
    return {"status": found.status, **said}


def _read_body(answer: dict[str, Any]) -> Row:
    if "choices" in answer:
        label = answer["choices"][0]["message"]["content"]
        return {"adapter": answer["model"], "label": label, **_tokens(answer)}
    retention = answer["retention"]
    return {
        "adapter": answer["model"],
        "ratio": retention["ratio"],
        "kept": retention["kept"],
        "selector": retention.get("selector"),
        "structure": answer.get("label_structure"),
        "label": json.dumps(answer["labels"]) if "labels" in answer else None,
        **_tokens(answer),
    }


def _tokens(answer: dict[str, Any]) -> Row:
    usage = answer.get("usage") or {}
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}


def _read_stream(text: str) -> Row:
    events = [line.removeprefix("data:").strip() for line in text.splitlines() if line]
    if events[-1] != "[DONE]":
        return {"status": 0, "error": f"the stream ended early: {events[-1][:200]}"}
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    label = "".join(delta.get("content") or "" for delta in deltas)
    return {"adapter": chunks[0]["model"], "label": label, **_tokens(chunks[-1])}


class Run:
    """One plan being sent.

    Args:
        plan: what to send.
        client: Locust's.
        start: monotonic time that the plan's times count from.
    """

    def __init__(self, plan: Plan, client: Any, start: float) -> None:
        self._plan, self._client, self._start = plan, client, start
        self.rows: list[Row] = []

    def send_all(self) -> None:
        """Sends everything, then waits for what is in flight."""
        import gevent

        greenlets = self._open(gevent) if self._plan.is_open else self._closed(gevent)
        gevent.joinall(greenlets, timeout=self._plan.timeout_s + _LAST_WORDS_S)

    def _open(self, gevent: Any) -> list[Any]:
        """Each request at its time, whatever became of those before."""
        in_flight: set[Any] = set()
        for number in self._plan.numbers:
            gevent.sleep(max(0.0, self._start + self._plan.requests[number][0] - time.monotonic()))
            if len(in_flight) >= self._plan.most_in_flight:
                now_s = time.monotonic() - self._start
                self.rows.append(self._plan.row(number, now_s, now_s) | {"error": DROPPED})
                continue
            greenlet = gevent.spawn(self._send, number)
            in_flight.add(greenlet)
            greenlet.rawlink(in_flight.discard)
        return list(in_flight)

    def _closed(self, gevent: Any) -> list[Any]:
        """As many at once as there are connections, each sending its next when one is answered."""
        waiting = iter(self._plan.numbers)
        gevent.sleep(max(0.0, self._start - time.monotonic()))
        connections = [gevent.spawn(self._work, waiting) for _ in range(self._plan.most_in_flight)]
        gevent.joinall(connections)
        return []

    def _work(self, waiting: Iterator[int]) -> None:
        limit_s = self._plan.seconds or float("inf")
        for number in waiting:
            self._send(number)
            if time.monotonic() - self._start >= limit_s:
                return

    def _send(self, number: int) -> None:
        sent_s = time.monotonic() - self._start
        found = call(self._client, self._plan.path, self._plan.bodies[number])
        row = self._plan.row(number, sent_s, found.done_at - self._start)
        if found.first_at is not None:
            row["first_byte_s"] = round(found.first_at - self._start, 6)
        self.rows.append(row | read(found))


def main(index: int, count: int) -> int:
    """Sends the plans that stdin names."""
    from locust import FastHttpUser
    from locust.env import Environment

    gc.disable()  # a collection holds every greenlet up for tens of milliseconds
    for line in iter(sys.stdin.readline, ""):
        folder = Path(json.loads(line))
        plan = Plan(folder, index, count)

        class Sender(FastHttpUser):
            """Holds the connections."""

            host = plan.url
            concurrency = plan.most_in_flight
            network_timeout = connection_timeout = plan.timeout_s

        user = Sender(Environment(user_classes=[Sender]))
        print("ready", flush=True)
        start_at = float(sys.stdin.readline())
        run = Run(plan, user.client, time.monotonic() + start_at - time.time())
        run.send_all()
        write(folder / f"requests-{index}.csv", run.rows)
        user.client.client.close()
        gc.collect()
        print("done", flush=True)
    return 0


def write(path: Path, rows: list[Row]) -> None:
    """Writes the rows by their numbers; the file is there only when it is whole."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda each: each["number"]))
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
