"""Sends a schedule with Locust: one greenlet a request, each at its time.

A process of its own (`python -m bench.locust_arrivals FOLDER`), because importing Locust patches
sockets, threads and time for gevent. It reads FOLDER/plan.json and FOLDER/bodies.jsonl, prints
`ready`, takes the start (seconds since the epoch) from stdin, and writes FOLDER/requests.csv.
Locust's own waits are closed-loop and its percentiles have two digits: only its user, HTTP client
and runner are used here.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

from serving.client_key import bearer_headers

COLUMNS = (
    *("number", "phase", "intended_s", "sent_s", "done_s"),
    *("status", "model", "ratio", "kept", "retry_after", "error"),
)
DROPPED = "dropped: too many in flight"
_LAST_WORDS_S = 5.0


class Plan:
    """What to send when.

    Args:
        folder: with plan.json and bodies.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        self.url: str = plan["url"]
        self.path: str = plan["path"]
        self.arrivals: list[tuple[float, str]] = [tuple(item) for item in plan["arrivals"]]
        self.most_in_flight: int = plan["most_in_flight"]
        self.timeout_s: float = plan["timeout_s"]
        self.common: dict[str, Any] = plan["common"]
        self.bodies: list[Any] = (folder / "bodies.jsonl").read_bytes().splitlines()
        assert len(self.bodies) == len(self.arrivals)


def main(folder: Path) -> int:
    """Sends everything, then waits for what is in flight."""
    import gevent
    from locust import FastHttpUser, task
    from locust.env import Environment

    plan = Plan(folder)
    rows: list[dict[str, Any]] = []

    class Dispatcher(FastHttpUser):
        """One user that starts a greenlet a request."""

        host = plan.url
        concurrency = plan.most_in_flight
        network_timeout = connection_timeout = plan.timeout_s

        @task
        def send_all(self) -> None:
            """Each request at its time, whatever became of those before."""
            in_flight: set[gevent.Greenlet] = set()
            for number, (at_s, _) in enumerate(plan.arrivals):
                gevent.sleep(max(0.0, start + at_s - time.monotonic()))
                if len(in_flight) >= plan.most_in_flight:
                    now_s = time.monotonic() - start
                    rows.append(row(plan, number, now_s, now_s) | {"error": DROPPED})
                    continue
                greenlet = gevent.spawn(self.send, number)
                in_flight.add(greenlet)
                greenlet.rawlink(in_flight.discard)
            gevent.joinall(list(in_flight), timeout=plan.timeout_s + _LAST_WORDS_S)
            self.environment.runner.quit()

        def send(self, number: int) -> None:
            """One request."""
            sent_s = time.monotonic() - start
            headers = {"Content-Type": "application/json", **bearer_headers()}
            # Redirects are followed by default, which costs nothing; switching it off is not safe
            # with several greenlets.
            response = self.client.request(
                "POST", plan.path, data=plan.bodies[number], headers=headers
            )
            done_s = time.monotonic() - start
            rows.append(row(plan, number, sent_s, done_s) | read(response))

    environment = Environment(user_classes=[Dispatcher])
    runner = environment.create_local_runner()
    print("ready", flush=True)
    start_at = float(sys.stdin.readline())
    start = time.monotonic() + start_at - time.time()
    runner.start(1, spawn_rate=1)
    runner.greenlet.join()
    with (folder / "requests.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda each: each["number"]))
    return 0


def row(plan: Plan, number: int, sent_s: float, done_s: float) -> dict[str, Any]:
    """What is known without an answer."""
    at_s, phase = plan.arrivals[number]
    times = {"intended_s": at_s, "sent_s": sent_s, "done_s": done_s}
    known = {key: round(value, 6) for key, value in times.items()}
    asked = {"model": plan.common.get("model"), "ratio": plan.common.get("retention_ratio")}
    return {"number": number, "phase": phase, **known, "status": 0, **asked}


def read(response: Any) -> dict[str, Any]:
    """Status and what the answer says; status 0 when there was none."""
    status = response.status_code or 0
    if status == 200:
        try:
            answer = response.json()
            retention = answer["retention"]
            found = {"ratio": retention["ratio"], "kept": retention["kept"]}
            return {"status": status, "model": answer["model"], **found}
        except (KeyError, TypeError, ValueError):
            return {"status": status, "error": "not a label's answer"}
    retry_after = (response.headers or {}).get("retry-after") if status else None
    text = str(response.text if status else response.error)
    return {"status": status, "retry_after": retry_after, "error": " ".join(text.split())[:300]}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
