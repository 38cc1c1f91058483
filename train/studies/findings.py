"""What a study found: tables, pictures, what follows and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.report.figures import SCORE
from train.report.tables import as_difference
from train.studies.spread import Figures, describe

ARM_HEADERS = ("answers of", "accuracy", "macro-F1", "weighted F1")
_METRICS = ("accuracy", "macro_f1", "weighted_f1")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    legend: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Means with their deviations.

    Attributes:
        name: of the file, without ending.
        across: what the points differ in.
        up: what is measured.
        lines: by name, points `(x, mean, std)`; x is a number or a word.
        levels: level lines, by name.
        is_log: whether x doubles from tick to tick.
    """

    name: str
    across: str
    up: str
    lines: Mapping[str, Sequence[tuple[Any, float, float | None]]]
    levels: Mapping[str, float] = field(default_factory=dict)
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A study's outcome.

    Attributes:
        question: what was asked and how, for a stranger.
        tables: with mean and deviation over seeds.
        conclusions: what follows, a sentence each.
        limits: what does not follow.
        figures: everything, for machines.
        plots: pictures.
        num_comparisons: pairs that met in a test.
        num_posts: posts that conclusions are drawn from, where they are not the dev posts.
    """

    question: str
    tables: Sequence[Table]
    conclusions: Sequence[str]
    figures: Figures
    limits: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    num_comparisons: int = 0
    num_posts: int | None = None


def arm_row(name: str, spread: Figures) -> list[object]:
    """A row under `ARM_HEADERS`."""
    return [name, *(said(spread[metric]) for metric in _METRICS)]


def said(spread: Figures) -> str:
    """`0.612 ± 0.013`, or the figure alone where there is one."""
    return mean_and_std(spread["by_seed"])


def mean_and_std(values: Sequence[float], *, digits: int = 3) -> str:
    """Mean and standard deviation of some figures."""
    spread = describe(values)
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{deviation}"


def macro(comparison: Figures) -> str:
    """The difference of macro-F1 with its interval."""
    text = as_difference(comparison["difference"][SCORE])
    assert text is not None
    return text


def p_value(comparison: Figures) -> str:
    """McNemar's, of the voted answers."""
    return f"{comparison['mcnemar']['p_value']:.2g}"


def direction(score: Figures) -> int:
    """1 where a difference is reliably above zero, -1 below, else 0.

    Reliable: the interval over posts leaves zero out, and all seeds have the same sign.
    """
    if score["low"] > 0 and min(score["by_seed"]) > 0:
        return 1
    return -1 if score["high"] < 0 and max(score["by_seed"]) < 0 else 0


def conclude(one: str, other: str, comparison: Figures) -> str:
    """A sentence on two models; the difference of macro-F1 decides."""
    score, test = comparison["difference"][SCORE], comparison["mcnemar"]
    verdict = {1: "is better than", -1: "is worse than", 0: "does not differ reliably from"}[
        direction(score)
    ]
    seeds = len(score["by_seed"])
    deviation = "" if score["std"] is None else f", deviation {score['std']:.3f} over {seeds} seeds"
    return (
        f"`{one}` {verdict} `{other}`: macro-F1 {macro(comparison)}{deviation}; McNemar p = "
        f"{p_value(comparison)} ({test['only_first']} post(s) only `{one}` has right, "
        f"{test['only_second']} only `{other}`)"
    )


def conclude_floor(arms: Mapping[str, Figures], majority: Figures) -> list[str]:
    """A warning where an arm is no more accurate than the majority label."""
    floor = majority["accuracy"]["mean"]
    low = [name for name, one in arms.items() if one["accuracy"]["mean"] <= floor]
    if not low:
        return []
    names = ", ".join(f"`{name}`" for name in low)
    return [
        f"Not above the majority label's accuracy of {floor:.3f}: {names}. What such a model has "
        "learned beyond the labels' frequencies is not shown, and differences between such models "
        "say little"
    ]


def point(x: object, spread: Figures, metric: str = SCORE) -> tuple[Any, float, float | None]:
    """A plot's point."""
    return x, spread[metric]["mean"], spread[metric]["std"]
