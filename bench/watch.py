"""What a server's /metrics say over time: replicas, the autoscaler's decisions, queue wait."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.client_key import bearer_headers

PERIOD_S = 1.0
CHANGES = ("more_tokens", "queue_wait", "from_zero", "fewer_tokens", "to_zero", "bounds")
"""Reasons of a changed target; the others say that one was held back."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One scrape.

    Attributes:
        at_s: seconds after the start of the run.
        running: engine replicas that run.
        target: those the autoscaler asked for.
        visual_tokens: in flight, as the autoscaler saw them.
        queue_wait_s: longest recent wait for an engine, as it saw it.
        pending: requests that the HTTP side has taken and not answered.
        decisions: by reason, since the server started.
    """

    at_s: float
    running: int
    target: int
    visual_tokens: float
    queue_wait_s: float
    pending: float
    decisions: Mapping[str, int] = field(default_factory=dict)


def read_look(at_s: float, text: str) -> Look:
    """What a text in Prometheus's format says; series of several replicas are summed."""
    ours = [line for line in text.splitlines() if line.startswith("sieve_")]
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families("\n".join(ours) + "\n"):
        for sample in family.samples:
            key = sample.name, sample.labels.get("state") or sample.labels.get("reason", "")
            sums[key] = sums.get(key, 0.0) + sample.value
    total = "sieve_autoscaling_decisions_total"
    return Look(
        at_s=at_s,
        running=int(sums.get(("sieve_replicas", "running"), 1)),
        target=int(sums.get(("sieve_replicas", "target"), 1)),
        visual_tokens=sums.get(("sieve_autoscaling_visual_tokens", ""), 0.0),
        queue_wait_s=sums.get(("sieve_autoscaling_queue_wait_seconds", ""), 0.0),
        pending=sums.get(("sieve_pending_requests", ""), 0.0),
        decisions={reason: int(value) for (name, reason), value in sums.items() if name == total},
    )


class Watch:
    """Scrapes once a second from a thread.

    Args:
        url: of the server.
        start_at: of the run, since the epoch.
    """

    def __init__(self, url: str, start_at: float) -> None:
        self.looks: list[Look] = []
        self.num_missed = 0
        self._url, self._start_at = f"{url}/metrics", start_at
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        headers = bearer_headers()
        with httpx.Client(headers=headers, timeout=10, trust_env=False) as client:
            while not self._stopped.is_set():
                began = time.monotonic()
                self._look(client)
                self._stopped.wait(max(0.0, PERIOD_S - (time.monotonic() - began)))

    def _look(self, client: httpx.Client) -> None:
        with contextlib.suppress(httpx.HTTPError):
            response = client.get(self._url)
            if response.status_code == 200:
                self.looks.append(read_look(time.time() - self._start_at, response.text))
                return
        self.num_missed += 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """A decision of the autoscaler, or a changed number of running replicas.

    Attributes:
        at_s: of the scrape that showed it first.
        what: e.g. `target 1 to 3` or `running 1 to 2`.
        reason: of a decision.
        visual_tokens: in flight at that scrape.
        queue_wait_s: longest recent wait at that scrape.
    """

    at_s: float
    what: str
    reason: str
    visual_tokens: float
    queue_wait_s: float


def events(looks: Sequence[Look]) -> list[Event]:
    """What happened between scrapes, in order.

    A decision's reason is counted up to two scrapes before or after its target shows; both come in
    the same order, so the n-th reason belongs to the n-th change.
    """
    found = []
    reasons: list[str] = []
    changes: list[tuple[Look, str]] = []
    for before, look in itertools.pairwise(looks):
        for reason, count in look.decisions.items():
            grown = count - before.decisions.get(reason, 0)
            if reason in CHANGES:
                reasons += [reason] * grown
            elif grown > 0:
                found.append(_event(look, "held back", reason))
        if look.target != before.target:
            changes.append((look, f"target {before.target} to {look.target}"))
        if look.running != before.running:
            found.append(_event(look, f"running {before.running} to {look.running}", ""))
    for index, (look, what) in enumerate(changes):
        found.append(_event(look, what, reasons[index] if index < len(reasons) else "?"))
    return sorted(found, key=lambda event: event.at_s)


def _event(look: Look, what: str, reason: str) -> Event:
    return Event(
        at_s=look.at_s,
        what=what,
        reason=reason,
        visual_tokens=look.visual_tokens,
        queue_wait_s=look.queue_wait_s,
    )
