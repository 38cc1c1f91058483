"""The table of `bench stages`: stages by ratio, their sum, and what Amdahl's law leaves.

Medians do not add up. So a column is a mean over the same requests for all of its rows: the middle
half of a ratio's requests by their end-to-end time, which no single slow one moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.flops import RATIOS
from bench.outcome import Outcome
from bench.stage_load import Load
from bench.stage_points import LOOP, SCALING, STAGES, UNATTRIBUTED
from bench.stage_server import PLAIN, TIMED
from bench.stage_spans import Timed
from bench.statistics import NUM_DRAWS, Estimate, Sample, median, paired_ratio

GOAL = 0.05
_SHOWN_MS = 0.005
"""Stages below that at every ratio have no row."""

Parts = Sequence[tuple[Timed, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Level:
    """A mean over the middle half of the requests, with its bootstrap 95 % interval, in ms."""

    ms: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Column:
    """One ratio.

    Attributes:
        ratio: of its requests.
        stages: milliseconds of each stage and of `UNATTRIBUTED`.
        whole: milliseconds from the first byte sent to the last of the answer.
        tokens: of the prompt.
    """

    ratio: float
    stages: Mapping[str, Level]
    whole: Level
    tokens: int

    @property
    def sum_ms(self) -> float:
        """Of the named stages."""
        return sum(self.stages[name].ms for name in STAGES)

    @property
    def scaling_ms(self) -> float:
        """Of those that grow with the tokens that are kept."""
        return sum(self.stages[name].ms for name in SCALING)

    def bound(self, full: Column) -> float:
        """Speed-up over `full` if what scales shrank as the prompt does, and nothing else did."""
        shrunk = full.scaling_ms * self.tokens / full.tokens
        return full.whole.ms / (full.whole.ms - full.scaling_ms + shrunk)


def summarise(
    parts: Parts,
    requests: Mapping[str, Sequence[Timed]],
    loads: Sequence[Load],
    options: argparse.Namespace,
) -> Outcome:
    """Stages, sums, bounds, what timing costs, and who is busy under load."""
    columns = [_column(ratio, parts) for ratio in RATIOS]
    full = columns[0]
    speedups = {ratio: _speedup(parts, ratio) for ratio in RATIOS[1:]}
    overhead = _overhead(requests)
    return Outcome(
        title=f"Stages of a post at {options.model}, {options.structure}: {options.rounds} rounds, "
        "one request at a time",
        headers=["stage, ms", *(f"{column.ratio:g}" for column in columns)],
        rows=[*_stage_rows(columns), *_sum_rows(columns), *_speed_rows(columns, speedups)],
        notes=_notes(columns, overhead) + [line for load in loads for line in _load_lines(load)],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results={
            "ratios": {
                str(column.ratio): _ratio_json(column, full, speedups.get(column.ratio))
                for column in columns
            },
            "limit": full.whole.ms / (full.whole.ms - full.scaling_ms),
            "overhead": vars(overhead) if overhead else None,
            "saturated": [_load_json(load) for load in loads],
        },
        samples=_samples(parts, requests),
    )


def levels(wholes: NDArray[np.float64], values: NDArray[np.float64]) -> list[Level]:
    """The level of each row of values, over the requests in the middle by their `wholes`.

    Args:
        wholes: `(N,)` end-to-end times.
        values: `(M, N)` of the same requests.
    """
    picks = np.random.default_rng(0).integers(0, wholes.size, (NUM_DRAWS, wholes.size))
    drawn = _middle(picks, wholes)
    (middle,) = _middle(np.arange(wholes.size)[None], wholes)
    found = []
    for row in values:
        low, high = np.percentile(row[drawn].mean(axis=1), (2.5, 97.5))
        found.append(Level(ms=float(row[middle].mean()), low=float(low), high=float(high)))
    return found


def _middle(picks: NDArray[np.int64], wholes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Of each row of requests, those in the middle half by their time."""
    ordered = np.take_along_axis(picks, np.argsort(wholes[picks], axis=1), axis=1)
    cut = wholes.size // 4
    return ordered[:, cut : wholes.size - cut]


def _column(ratio: float, parts: Parts) -> Column:
    its = [(request, stages) for request, stages in parts if request.ratio == ratio]
    names = (*STAGES, UNATTRIBUTED)
    wholes = 1e3 * np.array([request.end - request.start for request, _ in its])
    values = 1e3 * np.array([[stages[name] for _, stages in its] for name in names])
    *stages, whole = levels(wholes, np.vstack([values, wholes]))
    return Column(
        ratio=ratio,
        stages=dict(zip(names, stages, strict=True)),
        whole=whole,
        tokens=round(median([request.num_prompt_tokens for request, _ in its])),
    )


def _speedup(parts: Parts, ratio: float) -> Estimate:
    def seconds(wanted: float) -> list[float]:
        return [r.end - r.start for r, _ in parts if r.ratio == wanted]

    return paired_ratio(seconds(RATIOS[0]), seconds(ratio))


def _overhead(requests: Mapping[str, Sequence[Timed]]) -> Estimate | None:
    """Time of a round's requests with timers over without."""
    if PLAIN not in requests:
        return None
    rounds = {
        variant: [
            sum(r.end - r.start for r in found if r.round == index)
            for index in sorted({r.round for r in found})
        ]
        for variant, found in requests.items()
    }
    return paired_ratio(rounds[TIMED], rounds[PLAIN])


def _stage_rows(columns: Sequence[Column]) -> list[list[object]]:
    shown = [
        name for name in STAGES if any(column.stages[name].ms >= _SHOWN_MS for column in columns)
    ]
    return [
        [name, *(f"{column.stages[name].ms:.2f}" for column in columns)]
        for name in (*shown, UNATTRIBUTED)
    ]


def _sum_rows(columns: Sequence[Column]) -> list[list[object]]:
    return [
        ["sum of the named", *(f"{column.sum_ms:.2f}" for column in columns)],
        ["end to end", *(f"{column.whole.ms:.2f}" for column in columns)],
        ["sum / end to end", *(f"{c.sum_ms / c.whole.ms:.3f}" for c in columns)],
    ]


def _speed_rows(
    columns: Sequence[Column], speedups: Mapping[float, Estimate]
) -> list[list[object]]:
    full, *others = columns
    measured = [f"{speedups[column.ratio].median:.2f}" for column in others]
    return [
        ["prompt tokens", *(column.tokens for column in columns)],
        ["speed-up", "1", *measured],
        ["Amdahl's bound", "1", *(f"{column.bound(full):.2f}" for column in others)],
    ]


def _notes(columns: Sequence[Column], overhead: Estimate | None) -> list[str]:
    full = columns[0]
    off = max(abs(1 - column.sum_ms / column.whole.ms) for column in columns)
    limit = full.whole.ms / (full.whole.ms - full.scaling_ms)
    share = full.scaling_ms / full.whole.ms
    return [
        f"named stages are within {off:.1%} of the end-to-end time at every ratio: goal of "
        f"{GOAL:.0%} {'met' if off <= GOAL else 'missed'}",
        f"projector and prefill are {share:.0%} of the time at ratio 1.0: with both free, a "
        f"request could be {limit:.2f} times as fast, whatever the ratio",
        f"end to end at 1.0: {full.whole.ms:.1f} ms [{full.whole.low:.1f}, {full.whole.high:.1f}]",
        "timers: not compared (--overhead off)"
        if overhead is None
        else f"with timers a round takes {overhead} of its time without",
        f"`{LOOP}` is the event loop's steps that no other row names: middleware, admission, "
        "asyncio",
    ]


def _load_lines(load: Load) -> list[str]:
    cores = sorted(load.processor_s.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{role} {seconds / load.seconds:.2f}" for role, seconds in cores)
    tops = sorted(load.busy_s.items(), key=lambda item: -item[1])[:6]
    costs = ", ".join(
        f"{stage} ({role}) {1e3 * seconds / load.posts:.2f}" for (role, stage), seconds in tops
    )
    return [
        f"saturated at {load.ratio:g}: {load.posts / load.seconds:.1f} posts/s; cores: {shown}; "
        f"wall ms a post: {costs}"
    ]


def _ratio_json(column: Column, full: Column, speedup: Estimate | None) -> dict[str, object]:
    return {
        "stages": [{"name": name, **vars(found)} for name, found in column.stages.items()],
        "end_to_end_ms": column.whole.ms,
        "end_to_end": vars(column.whole),
        "sum_ms": column.sum_ms,
        "unattributed_ms": column.stages[UNATTRIBUTED].ms,
        "prompt_tokens": column.tokens,
        "speedup": vars(speedup) if speedup else None,
        "amdahl": column.bound(full) if speedup else None,
    }


def _load_json(load: Load) -> dict[str, object]:
    return {
        "ratio": load.ratio,
        "posts_per_s": load.posts / load.seconds,
        "cores": {role: seconds / load.seconds for role, seconds in load.processor_s.items()},
        "busy": [
            {"role": role, "stage": stage, "ms_a_post": 1e3 * seconds / load.posts}
            for (role, stage), seconds in load.busy_s.items()
        ],
    }


def _samples(parts: Parts, requests: Mapping[str, Sequence[Timed]]) -> list[Sample]:
    stages = [
        Sample(round=request.round, variant=f"{request.ratio:g}/{name}", seconds=seconds)
        for request, found in parts
        for name, seconds in found.items()
    ]
    wholes = [
        Sample(round=r.round, variant=f"{r.ratio:g}/whole/{variant}", seconds=r.end - r.start)
        for variant, found in requests.items()
        for r in found
    ]
    return stages + wholes
