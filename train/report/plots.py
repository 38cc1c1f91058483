"""An evaluation's figures as SVG: retention, reliability, confusion. No display is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Figures = Mapping[str, Any]
_LINES = ("tf-idf", "text only", "zero-shot base", "majority")
_STYLES = ("--", "-.", ":", (0, (1, 4)))
_SIZE = (6.4, 4.2)  # inches


def write_plots(report: Figures, folder: Path) -> list[str]:
    """Draws everything that the report has figures for.

    Returns:
        File names, in the order in which they are worth looking at.
    """
    wanted: dict[str, Callable[[Axes, Figures], None]] = {"confusion.svg": _draw_confusion}
    if len({cell["ratio"] for cell in report["cells"]}) > 1:
        wanted = {"retention.svg": _draw_retention, **wanted}
    if _whole(report)["reliability"]:
        wanted["reliability.svg"] = _draw_reliability
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "sieve", "font.size": 9}):
        for name, draw in wanted.items():
            figure = Figure(figsize=_SIZE, layout="constrained")
            draw(figure.subplots(), report)
            figure.savefig(folder / name, metadata={"Date": None})
    return list(wanted)


def _draw_retention(axes: Axes, report: Figures) -> None:
    """Macro-F1 against the ratio, an interval a point; baselines as level lines."""
    field = report["field"]
    for selector in dict.fromkeys(cell["selector"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["selector"] == selector]
        cells.sort(key=lambda cell: cell["ratio"])
        figures = [cell["fields"][field] for cell in cells]
        ratios = [cell["ratio"] for cell in cells]
        lines = axes.plot(ratios, [one["macro_f1"] for one in figures], marker="o", label=selector)
        low, high = zip(*(one["macro_f1_interval"] for one in figures), strict=True)
        axes.fill_between(ratios, low, high, alpha=0.12, color=lines[0].get_color(), linewidth=0)
    levels = {
        name: report["baselines"][name][field]["macro_f1"]
        for name in _LINES
        if field in report["baselines"].get(name, {})
    }
    if report["shuffled_images"]:
        levels["shuffled images"] = report["shuffled_images"]["fields"][field]["macro_f1"]
    for (name, level), style in zip(levels.items(), (*_STYLES, "-"), strict=False):
        axes.axhline(level, color="gray", linewidth=1, linestyle=style, label=name)
    axes.set(xlabel="retention ratio", ylabel=f"macro-F1 of {field}", xlim=(0, 1.02))
    axes.legend(fontsize=7, ncols=2)


def _draw_reliability(axes: Axes, report: Figures) -> None:
    """Accuracy against probability, a bar a bin; right on the diagonal is honest."""
    figures = _whole(report)
    bins = figures["reliability"]
    width = bins[0]["high"] - bins[0]["low"]
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    axes.bar(
        [item["low"] for item in bins],
        [item["accuracy"] for item in bins],
        width=width,
        align="edge",
        alpha=0.5,
        edgecolor="white",
        label="accuracy",
    )
    axes.plot(
        [item["confidence"] for item in bins],
        [item["accuracy"] for item in bins],
        marker="o",
        linestyle="none",
        label="mean probability",
    )
    for item in bins:
        axes.text(item["low"] + width / 2, 0.01, item["count"], ha="center", fontsize=6)
    axes.set(
        xlabel=f"probability of the answered {report['field']} label",
        ylabel="share that is right",
        xlim=(0, 1),
        ylim=(0, 1),
        title=f"ECE {figures['ece']:.3f}, posts a bin at the foot",
    )
    axes.legend(fontsize=7)


def _draw_confusion(axes: Axes, report: Figures) -> None:
    """Counts by true and answered label, shaded by the share of the true label."""
    figures = _whole(report)
    labels, counts = figures["labels"], figures["confusion"]
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            shade = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=shade)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=30, ha="right")
    axes.set_yticks(places, labels)
    axes.set(xlabel="answered", ylabel="true", title=f"{report['field']}, all visual tokens")


def _whole(report: Figures) -> Figures:
    """Figures of the last field at ratio 1.0."""
    cell = next(cell for cell in report["cells"] if cell["ratio"] == 1.0)
    figures: Figures = cell["fields"][report["field"]]
    return figures
