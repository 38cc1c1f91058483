"""From noted calls to stages: every instant of a request belongs to one of them, or to none.

At each instant the call counts that is furthest down a request's way: the model worker's before the
engine core's, that before the server's, and in one process the one that began last, which is the
innermost. What no call covers is a hand-over where the calls before and after it are another
process's or thread's, and else unattributed. So the parts of a request sum to its whole by
construction, and what was measured of it is the whole without the unattributed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.outcome import BenchError
from bench.stage_clock import MAX_ROWS, ROW
from bench.stage_points import (
    API,
    CORE,
    FORWARD,
    HANDING,
    HTTP,
    IMAGE,
    LATER,
    POINTS,
    PREFILL,
    QUEUE,
    STAGES,
    UNATTRIBUTED,
    WORKER,
    role_of,
    stage_of,
)

CLIENT = "client"
_RANK = {CLIENT: 0, API: 1, IMAGE: 2, CORE: 3, WORKER: 4}
_ROWS = np.dtype([("point", "<u4"), ("thread", "<u4"), ("start", "<f8"), ("end", "<f8")])
assert _ROWS.itemsize == ROW.size


@dataclass(frozen=True, slots=True)
class Span:
    """One call.

    Attributes:
        role: of its process.
        thread: the system's id of it.
        point: which function; -1 for the client's own.
        start: in seconds of the machine's clock.
        end: likewise.
    """

    role: str
    thread: int
    point: int
    start: float
    end: float


def read_spans(folder: Path) -> list[Span]:
    """All calls that a server's processes noted, by their start.

    Raises:
        BenchError: a process noted more than its file holds, or none was timed.
    """
    spans = [span for path in folder.glob("*.spans") for span in _read_process(path)]
    if not spans:
        raise BenchError("no call was timed: the hook was not loaded; is PYTHONPATH used here?")
    return sorted(spans, key=lambda span: span.start)


def process_roles(folder: Path) -> dict[int, str]:
    """What each process is that noted calls, by its id."""
    found = {int(path.stem): np.unique(_rows(path)["point"]) for path in folder.glob("*.spans")}
    return {
        pid: _role([int(point) - 1 for point in points])
        for pid, points in found.items()
        if len(points)
    }


def _rows(path: Path) -> np.ndarray:
    rows = np.fromfile(path, _ROWS)
    return rows[: int(np.count_nonzero(rows["point"]))]


def _read_process(path: Path) -> Iterable[Span]:
    rows = _rows(path)
    if len(rows) == MAX_ROWS:
        raise BenchError(
            f"a process noted {MAX_ROWS} calls and had no room for more; fewer --rounds"
        )
    role = _role([int(point) - 1 for point in np.unique(rows["point"])])
    for point, thread, start, end in rows.tolist():
        yield Span(role, thread, point - 1, start, end)


def _role(points: Sequence[int]) -> str:
    """The process that made these calls; the most downstream one of those they tell."""
    told = {role_of(point) for point in points} - {""}
    return max(told, key=_RANK.__getitem__) if told else API


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One request, as its client saw it.

    Attributes:
        round: of the run.
        ratio: that it asked for.
        start: when its first byte was sent.
        sent: when its last byte was.
        end: when the answer was whole.
        num_tokens: of its answer.
        num_prompt_tokens: kept visual ones among them.
    """

    round: int
    ratio: float
    start: float
    sent: float
    end: float
    num_tokens: int
    num_prompt_tokens: int


def attributed(
    spans: Sequence[Span], requests: Sequence[Timed]
) -> list[tuple[Timed, dict[str, float]]]:
    """Each request, which had the server to itself, with its seconds in each stage."""
    starts = np.array([span.start for span in spans])
    ends = np.array([span.end for span in spans])
    found = []
    for request in requests:
        its = np.flatnonzero((ends > request.start) & (starts < request.end))
        found.append((request, attribute([spans[index] for index in its], request)))
    return found


def attribute(spans: Sequence[Span], request: Timed) -> dict[str, float]:
    """Seconds of each stage within a request, from the calls of its time.

    Raises:
        BenchError: its prompt went through the model in several pieces.
    """
    found = [_cut(span, request) for span in spans]
    stage_in = _StageIn(found, request)
    found.append(Span(CLIENT, 0, -1, request.start, request.sent))
    pieces = _pieces(found, request)
    seconds = dict.fromkeys((*STAGES, UNATTRIBUTED), 0.0)
    for index, (span, start, end) in enumerate(pieces):
        before = pieces[index - 1][0] if index else None
        after = pieces[index + 1][0] if index + 1 < len(pieces) else None
        seconds[stage_in(span) if span else _gap(before, after)] += end - start
    return seconds


def _cut(span: Span, request: Timed) -> Span:
    start, end = max(span.start, request.start), min(span.end, request.end)
    return Span(span.role, span.thread, span.point, start, end)


class _StageIn:
    """The stage of a request's calls: what the model does after its first pass is decoding."""

    def __init__(self, spans: Sequence[Span], request: Timed) -> None:
        passes = sorted(span.start for span in spans if span.point == FORWARD)
        if len(passes) > max(1, request.num_tokens):
            raise BenchError(
                f"{len(passes)} passes of the model for {request.num_tokens} token(s): a prompt "
                "went through it in pieces, or labels needed further passes; take another "
                "--structure"
            )
        self._second = passes[1] if len(passes) > 1 else float("inf")

    def __call__(self, span: Span) -> str:
        if span.role == CLIENT:
            return HTTP
        stage = stage_of(span.point)
        return LATER if stage == PREFILL and span.start >= self._second else stage


def _pieces(spans: Sequence[Span], request: Timed) -> list[tuple[Span | None, float, float]]:
    """The request's time, cut where the call that counts changes; None where there is none."""
    at = sorted({request.start, request.end, *(t for s in spans for t in (s.start, s.end))})
    opening = sorted(spans, key=lambda span: span.start)
    active: list[Span] = []
    pieces: list[tuple[Span | None, float, float]] = []
    upcoming = 0
    for start, end in itertools.pairwise(at):
        while upcoming < len(opening) and opening[upcoming].start <= start:
            active.append(opening[upcoming])
            upcoming += 1
        active = [span for span in active if span.end > start]
        chosen = max(active, key=lambda s: (_RANK[s.role], s.start, -s.end), default=None)
        if pieces and pieces[-1][0] is chosen:
            pieces[-1] = (chosen, pieces[-1][1], end)
        else:
            pieces.append((chosen, start, end))
    return pieces


def _gap(before: Span | None, after: Span | None) -> str:
    """What the time between two calls is; the client is before the first and after the last."""
    sender = before.role if before is not None else CLIENT
    receiver = after.role if after is not None else CLIENT
    if CLIENT in (sender, receiver):
        return HTTP if API in (sender, receiver) else UNATTRIBUTED
    if sender != receiver:
        return HANDING
    assert before is not None
    assert after is not None
    if before.thread == after.thread:
        return UNATTRIBUTED
    return QUEUE if sender == CORE else HANDING


def busy(spans: Sequence[Span], start: float, end: float) -> Mapping[tuple[str, str], float]:
    """Seconds that each process was in each stage, calls that only wait left out.

    A call's own time is what is not in a timed call inside it, on the same thread.
    """
    totals: dict[tuple[str, str], float] = defaultdict(float)
    threads: dict[tuple[str, int], list[Span]] = {}
    for span in spans:
        if span.start >= start and span.end <= end:
            threads.setdefault((span.role, span.thread), []).append(span)
    for (role, _), calls in threads.items():
        stack: list[Span] = []
        for call in sorted(calls, key=lambda call: (call.start, -call.end)):
            while stack and stack[-1].end <= call.start:
                stack.pop()
            length = call.end - call.start
            if stack:
                totals[role, _stage_of_work(stack[-1])] -= length
            totals[role, _stage_of_work(call)] += length
            stack.append(call)
    return {key: value for key, value in totals.items() if key[1]}


def _stage_of_work(span: Span) -> str:
    waits = span.point < len(POINTS) and POINTS[span.point].waits
    return "" if waits else stage_of(span.point)
