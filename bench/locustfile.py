"""The same open-loop load for Locust's own web UI, and for `locust --headless`.

    locust -f bench/locustfile.py --host http://127.0.0.1:8000 --rate 5 --ratios 1.0,0.4

Each of Locust's users is a source of --rate requests a second with a schedule of its own, one
greenlet a request, so two users send twice the rate and no answer is waited for. Statistics have
three lines: `service` (from sending, as Locust measures), `from arrival` (from when the request was
due, which is what a client of this rate sees), and `first byte`. Locust rounds its percentiles to
two digits: `python -m bench load` keeps every request.
"""

from __future__ import annotations

import itertools
import json
import time
from argparse import Namespace
from typing import Any

import gevent
from locust import FastHttpUser, events, task

from bench import mix
from bench.generator import LABEL
from bench.locust_arrivals import call, read
from bench.profiles import BURSTINESS, SPACINGS, Phase, schedule

_HOUR_S = 3600.0
_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Options, also fields of the web UI's form."""
    add = parser.add_argument
    add("--rate", type=float, default=5.0, help="requests a second of each user")
    add("--spacing", choices=SPACINGS, default="poisson", help="of arrivals")
    add("--burstiness", type=float, default=BURSTINESS, help="of gamma gaps")
    add("--most-in-flight", type=int, default=200, help="of each user; more are dropped")
    add("--ratios", default="", help="retention ratios, with commas")
    add("--adapters", default="", help="models or adapters, with commas")
    add("--selectors", default="", help="of patches, with commas")
    add("--structures", default="", help="label structures, with commas")
    add("--data", default="", help="posts: a folder, JSONL, ... (default pictures of noise)")
    add("--picture-size", type=int, default=224, help="of noise, pixels a side")
    add("--posts", type=int, default=200, help="encoded before a user starts, then again in turn")
    add("--seed", type=int, default=0, help="of times and posts")


@events.init.add_listener
def start_clock(**_: Any) -> None:
    """Gevent's clock stood still during the imports, which would count as a part of --run-time."""
    gevent.get_hub().loop.update_now()


def _values(text: str) -> list[str] | None:
    return [value.strip() for value in text.split(",") if value.strip()] or None


class OpenLoopUser(FastHttpUser):
    """A source of requests that waits for no answer."""

    concurrency = 1000

    def on_start(self) -> None:
        """Encodes posts and draws the schedule."""
        chosen = self.environment.parsed_options
        seed = chosen.seed + next(_numbers)
        ratios = _values(chosen.ratios)
        options = Namespace(
            seed=seed,
            data=chosen.data or None,
            picture_size=chosen.picture_size,
            adapters=_values(chosen.adapters),
            structures=_values(chosen.structures),
            selectors=_values(chosen.selectors),
            ratios=ratios and [float(ratio) for ratio in ratios],
        )
        asked = mix.bodies(mix.contents(options), mix.mix_of(options), seed)
        self._bodies = [
            json.dumps(body).encode() for _, body in itertools.islice(asked, chosen.posts)
        ]
        hour = Phase(name="hour", seconds=_HOUR_S, start=chosen.rate, end=chosen.rate)
        self._arrivals = schedule([hour], seed, chosen.spacing, chosen.burstiness)
        self._most, self._in_flight = chosen.most_in_flight, set[gevent.Greenlet]()

    @task
    def send_all(self) -> None:
        """An hour of arrivals; then the same again."""
        start = time.monotonic()
        for arrival, body in zip(self._arrivals, itertools.cycle(self._bodies), strict=False):
            due = start + arrival.at_s
            gevent.sleep(max(0.0, due - time.monotonic()))
            if len(self._in_flight) >= self._most:
                self._count("dropped", 0.0, "too many in flight")
                continue
            greenlet = gevent.spawn(self._send, due, body)
            self._in_flight.add(greenlet)
            greenlet.rawlink(self._in_flight.discard)

    def on_stop(self) -> None:
        """What is in flight is waited for, as long as --stop-timeout allows."""
        gevent.joinall(list(self._in_flight), timeout=self.network_timeout)

    def _send(self, due: float, body: bytes) -> None:
        found = call(self.client, LABEL, body, name="service")
        row = read(found)
        error = row.get("error") if row["status"] != 200 or "error" in row else None
        self._count("from arrival", 1e3 * (found.done_at - due), error)
        if found.first_at is not None:
            self._count("first byte", 1e3 * (found.first_at - due), None)

    def _count(self, name: str, milliseconds: float, error: str | None) -> None:
        self.environment.events.request.fire(
            request_type="POST",
            name=name,
            response_time=milliseconds,
            response_length=0,
            exception=None if error is None else RuntimeError(error),
            context={},
        )
