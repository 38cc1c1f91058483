"""A report's plots as SVG, coloured by the page's CSS variables, without a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Found = Mapping[str, Any]

NUM_SHADES = 6
"""Of ratios, from the whole image to the least of it: `--shade-0` to `--shade-5`."""
_MOST_STAGES = 7
_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 96, 16, 52


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About so many round numbers that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Where values are on the picture.

    Attributes:
        x: ticks of the horizontal axis; the first and the last are its ends.
        y: of the vertical axis.
        left: of the plot's area, in pixels, as the following.
        width: of the area.
        top: of the area.
        height: of the area.
    """

    x: Sequence[float]
    y: Sequence[float]
    left: float = _LEFT
    width: float = _WIDTH - _LEFT - _RIGHT
    top: float = _TOP
    height: float = _HEIGHT - _TOP - _BOTTOM

    def at_x(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + self.width * (value - self.x[0]) / (self.x[-1] - self.x[0])

    def at_y(self, value: float) -> float:
        """Pixels from the top."""
        share = (value - self.y[0]) / (self.y[-1] - self.y[0])
        return self.top + self.height * (1 - share)

    def frame(self, x_title: str, y_title: str) -> str:
        """Grid, ticks and titles."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for value in self.y:
            at = self.at_y(value)
            parts.append(line(self.left, at, right, at, "grid"))
            parts.append(text(self.left - 8, at + 4, f"{value:g}", "tick end"))
        for value in self.x:
            at = self.at_x(value)
            parts.append(line(at, bottom, at, bottom + 4, "axis"))
            parts.append(text(at, bottom + 18, f"{value:g}", "tick middle"))
        parts.append(line(self.left, bottom, right, bottom, "axis"))
        parts.append(text(self.left + self.width / 2, bottom + 40, x_title, "title middle"))
        turn = f'transform="rotate(-90 14 {self.top + self.height / 2:.1f})"'
        middle = self.top + self.height / 2
        parts.append(text(14, middle, y_title, "title middle", turn))
        return "".join(parts)


def line(x1: float, y1: float, x2: float, y2: float, kind: str, style: str = "") -> str:
    """A line of a CSS class."""
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        f"{_style(style)}/>"
    )


def text(x: float, y: float, content: str, kind: str, extra: str = "") -> str:
    """A text of a CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {extra}>{escape(content)}</text>'


def _style(style: str) -> str:
    return f' style="{style}"' if style else ""


def svg(content: Iterable[str], name: str, height: float = _HEIGHT) -> str:
    """A picture that is as wide as the page lets it be, with its name for readers aloud."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">'
        f"<title>{escape(name)}</title>{''.join(content)}</svg>"
    )


_MARKS = ("circle", "square", "triangle", "diamond")


def mark(kind: str, x: float, y: float, style: str, hint: str, size: float = 6.5) -> str:
    """A marker with a hint for who points at it."""
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"',
        "square": f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" '
        f'height="{2 * size}"',
        "triangle": f'<path d="M{x:.1f} {y - 1.2 * size:.1f}l{1.15 * size:.1f} {2 * size:.1f}'
        f'h{-2.3 * size:.1f}z"',
        "diamond": f'<path d="M{x:.1f} {y - 1.3 * size:.1f}l{1.3 * size:.1f} {1.3 * size:.1f}'
        f'l{-1.3 * size:.1f} {1.3 * size:.1f}l{-1.3 * size:.1f} {-1.3 * size:.1f}z"',
    }
    return f'{shapes[kind]} class="mark"{_style(style)}><title>{escape(hint)}</title>{_CLOSE[kind]}'


_CLOSE = {"circle": "</circle>", "square": "</rect>", "triangle": "</path>", "diamond": "</path>"}


def pareto(cells: Sequence[Found]) -> str:
    """F1 against posts/s: error bars both ways, dominated cells hollow, a line along the others."""
    points = [cell for cell in cells if cell["posts_per_s"] and cell["macro_f1"]]
    axes = Axes(x=_ticks(points, "posts_per_s", "median"), y=_ticks(points, "macro_f1", "value"))
    selectors = list(dict.fromkeys(cell["selector"] for cell in cells))
    front = sorted(
        (cell for cell in points if not cell["dominated"]),
        key=lambda cell: cell["posts_per_s"]["median"],
    )
    path = " ".join(_place(axes, cell) for cell in front)
    parts = [axes.frame("posts/s, saturated", "macro-F1")]
    parts.append(f'<polyline class="front" points="{path}"/>')
    parts += [_bars(axes, cell, selectors.index(cell["selector"])) for cell in points]
    parts += [_point(axes, cell, selectors.index(cell["selector"])) for cell in points]
    parts += _selector_legend(axes, selectors)
    return svg(parts, "Macro-F1 against posts a second")


def _ticks(points: Sequence[Found], name: str, middle: str) -> list[float]:
    values = [point[name][key] for point in points for key in (middle, "low", "high")]
    return nice_ticks(min(values), max(values))


def _place(axes: Axes, cell: Found) -> str:
    x, y = axes.at_x(cell["posts_per_s"]["median"]), axes.at_y(cell["macro_f1"]["value"])
    return f"{x:.1f},{y:.1f}"


def _bars(axes: Axes, cell: Found, place: int) -> str:
    speed, f1 = cell["posts_per_s"], cell["macro_f1"]
    x, y = axes.at_x(speed["median"]), axes.at_y(f1["value"])
    style = f"stroke:var(--series-{place % len(_MARKS)})"
    across = line(axes.at_x(speed["low"]), y, axes.at_x(speed["high"]), y, "bar", style)
    along = line(x, axes.at_y(f1["low"]), x, axes.at_y(f1["high"]), "bar", style)
    return across + along


def _point(axes: Axes, cell: Found, place: int) -> str:
    x, y = axes.at_x(cell["posts_per_s"]["median"]), axes.at_y(cell["macro_f1"]["value"])
    place %= len(_MARKS)
    colour = f"var(--series-{place})"
    fill = "var(--page)" if cell["dominated"] else colour
    hint = (
        f"{cell['name']}: {cell['posts_per_s']['median']:.1f} posts/s, "
        f"F1 {cell['macro_f1']['value']:.3f}{', dominated' if cell['dominated'] else ''}"
    )
    found = mark(_MARKS[place], x, y, f"fill:{fill};stroke:{colour}", hint)
    return found + text(x + 10, y - 8, f"{cell['ratio']:g}", "label")


def _selector_legend(axes: Axes, selectors: Sequence[str]) -> list[str]:
    left = axes.left + axes.width + 12
    parts = []
    for place, selector in enumerate(selectors):
        y, kind = axes.top + 14 + 22 * place, place % len(_MARKS)
        colour = f"var(--series-{kind})"
        parts.append(mark(_MARKS[kind], left, y - 4, f"fill:{colour};stroke:{colour}", selector, 5))
        parts.append(text(left + 12, y, selector, "label"))
    y = axes.top + 14 + 22 * len(selectors)
    parts.append(
        mark("circle", left, y - 4, "fill:var(--page);stroke:var(--muted)", "dominated", 5)
    )
    return [*parts, text(left + 12, y, "dominated", "label")]


def latency(points: Sequence[Found], goal_ms: float | None) -> str:
    """p50 and p95 by rate, a line a ratio; hollow where the generator fell behind."""
    ratios = sorted({point["ratio"] for point in points}, reverse=True)
    panels = [_panel(points, ratios, name, goal_ms) for name in ("p50_ms", "p95_ms")]
    return f'<div class="pair">{"".join(panels)}</div>'


def _panel(
    points: Sequence[Found], ratios: Sequence[float], name: str, goal_ms: float | None
) -> str:
    known = [point for point in points if point[name] is not None]
    if not known:
        return ""
    highest = max([point[name] for point in known] + [goal_ms or 0.0])
    axes = Axes(
        x=nice_ticks(0.0, max(point["rate"] for point in known)), y=nice_ticks(0.0, highest)
    )
    percentile = name.removesuffix("_ms")
    parts = [axes.frame("requests a second, open loop", f"{percentile}, ms")]
    if goal_ms is not None:
        at = axes.at_y(goal_ms)
        parts.append(line(axes.left, at, axes.left + axes.width, at, "goal"))
        parts.append(text(axes.left + 6, at - 6, f"goal {goal_ms:g} ms", "tick"))
    for place, ratio in enumerate(ratios):
        of_ratio = sorted(
            (point for point in known if point["ratio"] == ratio), key=lambda each: each["rate"]
        )
        parts.append(_curve(axes, of_ratio, name, _shade(place, len(ratios))))
        y = axes.top + 14 + 20 * place
        left = axes.left + axes.width + 12
        parts.append(line(left, y - 4, left + 16, y - 4, "curve", _stroke(place, len(ratios))))
        parts.append(text(left + 22, y, f"{ratio:g}", "label"))
    return svg(parts, f"{percentile} against load")


def _shade(place: int, count: int) -> str:
    return f"var(--shade-{place * (NUM_SHADES - 1) // max(1, count - 1)})"


def _stroke(place: int, count: int) -> str:
    return f"stroke:{_shade(place, count)}"


def _curve(axes: Axes, points: Sequence[Found], name: str, colour: str) -> str:
    places = [(axes.at_x(point["rate"]), axes.at_y(point[name])) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="curve" style="stroke:{colour}" points="{path}"/>']
    for (x, y), point in zip(places, points, strict=True):
        fill = "var(--page)" if point["void"] else colour
        hint = f"{point['name']} at {point['rate']:.1f}/s: {point[name]:.0f} ms"
        hint += ", void" if point["void"] else ""
        parts.append(mark("circle", x, y, f"fill:{fill};stroke:{colour}", hint, 4))
    return "".join(parts)


def stages(found: Found) -> str:
    """A bar a ratio, its stages in their order; small ones are together in `other`."""
    ratios = found["ratios"]
    largest = _largest_stages(ratios)
    longest = max(sum(stage["ms"] for stage in each["stages"]) for each in ratios.values())
    axes = Axes(x=nice_ticks(0.0, longest), y=(0.0, 1.0), height=34.0 * len(ratios))
    parts = []
    for value in axes.x:
        at = axes.at_x(value)
        parts.append(line(at, axes.top, at, axes.top + axes.height, "grid"))
        parts.append(text(at, axes.top + axes.height + 18, f"{value:g}", "tick middle"))
    for place, (ratio, each) in enumerate(ratios.items()):
        y = axes.top + 34.0 * place + 5
        parts.append(text(axes.left - 8, y + 17, str(ratio), "tick end"))
        parts.append(_stacked(axes, y, each["stages"], largest))
    bottom = axes.top + axes.height
    parts.append(text(axes.left + axes.width / 2, bottom + 40, "ms", "title middle"))
    parts += _stage_legend([*largest, "other"], bottom + 62)
    return svg(parts, "Where the time goes, by ratio", bottom + 74 + 22 * math.ceil(8 / 4))


def _largest_stages(ratios: Found) -> list[str]:
    totals: dict[str, float] = {}
    for each in ratios.values():
        for stage in each["stages"]:
            totals[stage["name"]] = totals.get(stage["name"], 0.0) + stage["ms"]
    kept = sorted(totals, key=lambda name: -totals[name])[:_MOST_STAGES]
    return [name for name in totals if name in kept]


def _stacked(axes: Axes, y: float, parts: Sequence[Found], largest: Sequence[str]) -> str:
    sums = dict.fromkeys([*largest, "other"], 0.0)
    for stage in parts:
        sums[stage["name"] if stage["name"] in largest else "other"] += max(0.0, stage["ms"])
    drawn, begin = [], 0.0
    for place, (name, ms) in enumerate(sums.items()):
        left, right = axes.at_x(begin), axes.at_x(begin + ms)
        begin += ms
        if right - left > 0.05:
            drawn.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(0.3, right - left - 1):.1f}" '
                f'height="24" style="fill:{_stage_colour(name, place)}">'
                f"<title>{escape(name)}: {ms:.2f} ms</title></rect>"
            )
    return "".join(drawn)


def _stage_colour(name: str, place: int) -> str:
    return "var(--muted)" if name == "other" else f"var(--series-{place})"


def _stage_legend(names: Sequence[str], top: float) -> list[str]:
    parts = []
    for place, name in enumerate(names):
        x, y = _LEFT + 165.0 * (place % 4), top + 22.0 * (place // 4)
        style = f"fill:{_stage_colour(name, place)};stroke:none"
        parts.append(mark("square", x, y - 4, style, name, 5))
        parts.append(text(x + 12, y, name, "label"))
    return parts
