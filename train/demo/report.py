"""The quality report as a table for people; `report.json` holds the same for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.demo.sweep import RATIOS, SELECTOR_NAMES


def render_report(report: Mapping[str, Any]) -> str:
    """Accuracy of the merged label on the balanced test set, an adapter a block."""
    lines = []
    for name, quality in report["adapters"].items():
        lines += [f"{name}: accuracy on the balanced test set, by retention ratio"]
        lines += [_row("selector", [f"{ratio:g}" for ratio in RATIOS])]
        for selector in SELECTOR_NAMES:
            values = quality["balanced test"][selector]
            cells = [f"{values[f'{ratio:g}']['accuracy']:.3f}" for ratio in RATIOS]
            lines.append(_row(selector, cells))
        lines += [_row(case, [f"{one['accuracy']:.3f}"]) for case, one in _others(quality)]
        lines.append("")
    attention = report["attention"]
    share, uniform = attention["share, mean"], attention["share, uniform"]
    lines.append(f"[CLS] attention on the face: {share:.0%} (evenly spread: {uniform:.0%})")
    return "\n".join(lines)


def _others(quality: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    skipped = ("balanced test",)
    return [(case, value) for case, value in quality.items() if case not in skipped]


def _row(title: str, cells: list[str]) -> str:
    return f"  {title:<34}" + "".join(f"{cell:>7}" for cell in cells)
