"""What became of each request of a fault drill, in words that the table counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OK = "ok"
REFUSED = "refused"
"""429, or 503 with Retry-After: the client may come again."""
CRASHED = "crashed"
"""503 engine_crashed with Retry-After, or quarantined: its engine failed by itself."""
BROKEN = "broken"
"""A stream that had started and did not end as it should."""
CONNECTION = "connection"
"""The connection ended without an answer: a proxy is gone."""
FAILED = "failed"
OUTCOMES = (OK, FAILED, REFUSED, CRASHED, BROKEN, CONNECTION)

MIN_SAMPLES = 40
"""A p95 of fewer has less than two answers above it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request.

    Attributes:
        kind: what was sent.
        at_s: intended arrival, after the start of the load.
        seconds: from then to the last byte.
        outcome: one of `OUTCOMES`.
        detail: status, error code or exception, for whoever asks why.
    """

    kind: str
    at_s: float
    seconds: float
    outcome: str
    detail: str = ""


def outcome_of(status: int, headers: Mapping[str, str], body: object) -> tuple[str, str]:
    """Outcome and detail of a complete answer that is no stream."""
    error = body.get("error") if isinstance(body, dict) else None
    code = (error or {}).get("code") or (error or {}).get("message") or ""
    detail = f"{status} {code}".strip()[:200]
    if status == 200 and not error and isinstance(body, dict):
        return OK, ""
    can_retry = "retry-after" in {name.lower() for name in headers}
    if code == "quarantined" or (code == "engine_crashed" and can_retry):
        return CRASHED, detail
    if status in (429, 503) and can_retry:
        return REFUSED, detail
    return FAILED, detail


def outcome_of_stream(lines: Sequence[str]) -> tuple[str, str]:
    """Outcome and detail of a stream that had started: whole, or broken."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    for event in events:
        if event.startswith("{") and "error" in json.loads(event):
            return BROKEN, str(json.loads(event)["error"].get("code"))
    if not events or events[-1] != "[DONE]":
        return BROKEN, "ended early"
    return OK, ""


def p95(answers: Sequence[Answer]) -> str:
    """Milliseconds within which 95 % were answered, of those that were; with their number."""
    seconds = [answer.seconds for answer in answers if answer.outcome == OK]
    if len(seconds) < MIN_SAMPLES:
        return f"n={len(seconds)}"
    return f"{1e3 * float(np.percentile(seconds, 95)):.0f} (n={len(seconds)})"


def between(answers: Sequence[Answer], start_s: float, end_s: float) -> list[Answer]:
    """Those whose intended arrival was in a span of time."""
    return [answer for answer in answers if start_s <= answer.at_s < end_s]


def count(answers: Sequence[Answer]) -> dict[str, int]:
    """How many had each outcome; every outcome is there."""
    found = Counter(answer.outcome for answer in answers)
    return {outcome: found[outcome] for outcome in OUTCOMES}


class CounterGrowth:
    """How much counters grew, summed over series that come and go with their processes."""

    def __init__(self) -> None:
        self._first: dict[str, float] | None = None
        self._last: dict[str, float] = {}

    def see(self, name: str, exposition: str) -> None:
        """Takes a scrape in Prometheus's text format."""
        series = {
            labels: float(value)
            for labels, value in (
                line.rsplit(" ", 1) for line in exposition.splitlines() if line.startswith(name)
            )
        }
        if self._first is None:
            self._first = series
        self._last |= series

    @property
    def total(self) -> int:
        """Growth since the first scrape; a series that came later counts from zero."""
        first = self._first or {}
        return round(sum(value - first.get(key, 0.0) for key, value in self._last.items()))
