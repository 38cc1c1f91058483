"""The tables of a report, for Markdown, HTML and CSV alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.cost import assumptions, costs, shape_ms
from bench.flops import PAPER_SPEEDUPS, SHAPES
from bench.roofline import DEVICES, Device
from bench.tables import markdown_table

Found = Mapping[str, Any]

CELL_HEADERS = (
    *("ratio", "selector", "kept", "posts/s [95 %]", "speed-up [95 %]", "goodput/s (in time)"),
    *("macro-F1 [95 %]", "F1 - F1(1.0) [95 %]", "accuracy", "p50 ms", "p95 ms", "p99 ms"),
    *("failures", "dominated"),
)
_SEVEN_B = "llava-1.5-7b"
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table.

    Attributes:
        title: of its section.
        headers: of its columns.
        rows: of texts and numbers.
        notes: below it, a line each.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """As a section."""
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"## {self.title}\n\n{markdown_table(self.headers, self.rows)}\n{notes}"


def number(value: float | None, form: str = ".0f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def interval(found: Found | None, form: str = ".3f", key: str = "value") -> str:
    """A value with its interval, or a dash."""
    if found is None:
        return "-"
    return f"{found[key]:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def cell_rows(cells: Sequence[Found]) -> list[list[object]]:
    """A row a ratio and selector."""
    return [
        [
            f"{cell['ratio']:g}",
            "all" if cell["ratio"] == 1.0 else cell["selector"],
            number(cell["kept"]),
            interval(cell["posts_per_s"], ".1f", "median"),
            interval(cell["speedup"], ".2f", "median"),
            goodput(cell["goodput"]),
            interval(cell["macro_f1"]),
            "reference" if cell["ratio"] == 1.0 else interval(cell["f1_minus_full"], "+.3f"),
            number(cell["accuracy"] and cell["accuracy"]["value"], ".3f"),
            *(number(cell[f"p{percent}_ms"]) for percent in (50, 95, 99)),
            cell["failures"],
            "yes" if cell["dominated"] else "",
        ]
        for cell in cells
    ]


def goodput(found: Found | None) -> str:
    """A rate with the share that was in time, or why there is none."""
    if found is None:
        return "-"
    if not found["rate"]:
        return "none met"
    void = ", void" if found["void"] else ""
    return f"{found['rate']:.1f} ({interval(found['within'])}{void})"


def ratio_table(stored: Found) -> Table:
    """The table of a sweep."""
    rows = cell_rows(stored["results"]["cells"])
    return Table(title="Ratios", headers=CELL_HEADERS, rows=rows, notes=stored["notes"])


def speedup_table(sweep: Found, shape: Found | None) -> Table:
    """Measured speed-ups beside the FLOP model and the paper."""
    cost = {each["ratio"]: each for each in (sweep["cost"] or {"ratios": []})["ratios"]}
    big = {float(r): c for r, c in (shape or {}).items() if isinstance(c, dict) and "speedup" in c}
    headers = ["ratio", "here [95 %]", "FLOP model, this shape", "FLOP model, 7B"]
    headers += ["7B shape [95 %]"] * bool(big) + ["paper, Table 4"]
    rows = [
        [
            f"{cell['ratio']:g}",
            interval(cell["speedup"], ".2f", "median"),
            number(cost.get(cell["ratio"], {}).get("flop_speedup"), ".2f"),
            f"{SHAPES[_SEVEN_B].speedup(cell['ratio'], text_tokens=50, output_tokens=1):.2f}",
            *([_shape_speedup(big, cell["ratio"])] if big else []),
            number(PAPER_SPEEDUPS.get(cell["ratio"]), ".2f"),
        ]
        for cell in _first_selector(sweep["cells"])
    ]
    notes = [
        "here: posts/s over that of ratio 1.0 in the same round, first selector",
        "FLOP model: bench/flops.py; 7B with 50 text tokens and one output token",
        "paper: 'Towards Robust Multimodal Sentiment Detection with LLaVA', another machine and "
        "answers",
    ]
    return Table(title="Speed-ups beside model and paper", headers=headers, rows=rows, notes=notes)


def _shape_speedup(big: Mapping[float, Found], ratio: float) -> str:
    found = big.get(ratio)
    return interval(found["speedup"], ".2f", "median") if found else "-"


def _first_selector(cells: Sequence[Found]) -> list[Found]:
    first: dict[float, Found] = {}
    for cell in cells:
        first.setdefault(cell["ratio"], cell)
    return list(first.values())


def latency_table(sweep: Found) -> Table:
    """Open loops by ratio and rate."""
    headers = ["cell", "load", "requests/s", "n", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    headers += ["in time [95 %]", "meets goal", "void"]
    rows = [
        [
            point["name"],
            f"{point['load']:.0%}",
            f"{point['rate']:.1f}",
            point["n"],
            *(number(point[f"p{percent}_ms"]) for percent in (50, 90, 95, 99)),
            interval(point["within"]),
            "yes" if point["meets"] else "no",
            "; ".join(point["void"]),
        ]
        for point in sweep["latency"]
    ]
    notes = ["from when a request was due; load is the share of that ratio's saturated rate"]
    return Table(title="Latency against load", headers=headers, rows=rows, notes=notes)


def stage_tables(stages: Found) -> Table:
    """Milliseconds of each stage at each ratio."""
    ratios = stages["ratios"]
    names = list(dict.fromkeys(s["name"] for found in ratios.values() for s in found["stages"]))
    by_ratio = {r: {s["name"]: s["ms"] for s in found["stages"]} for r, found in ratios.items()}
    rows: list[list[object]] = [
        [name, *(number(by_ratio[ratio].get(name), ".3g") for ratio in ratios)] for name in names
    ]
    for title, key in (("sum", "sum_ms"), ("end to end", "end_to_end_ms")):
        rows.append([title, *(number(found[key], ".4g") for found in ratios.values())])
    bounds = [number(found.get("amdahl"), ".2f") for found in ratios.values()]
    rows.append(["Amdahl bound", *bounds])
    return Table(title="Stages", headers=["ms", *ratios], rows=rows)


def peer_table(peers: Found) -> Table:
    """Others at the same work."""
    rows = [
        [name, _rate(found.get("posts_per_s")), interval(found.get("ratio"), ".3f", "median")]
        for name, found in peers.items()
        if isinstance(found, dict) and "posts_per_s" in found
    ]
    return Table(title="Peers", headers=["peer", "posts/s", "ratio [95 %]"], rows=rows)


def _rate(found: Any) -> str:
    return interval(found, ".1f", "median") if isinstance(found, dict) else number(found, ".1f")


def cost_table(cost: Found) -> Table:
    """Predicted beside measured on this machine."""
    name = cost["devices"][0]["name"]
    rows = [
        [
            f"{each['ratio']:g}",
            f"{each['flops'] / 1e9:.4g}",
            f"{each['bytes'] / 1e6:.4g}",
            f"{each['floor_ms'][name]:.3g}",
            f"{each['measured_ms']:.3g}",
            f"{each['measured_ms'] / each['floor_ms'][name]:.1f}",
        ]
        for each in cost["ratios"]
    ]
    return Table(
        title="Cost of a post, here",
        headers=["ratio", "GFLOP", "MB", "predicted ms", "measured ms", "measured / predicted"],
        rows=rows,
        notes=[*assumptions(cost)[:2], "measured: a second over the saturated posts/s"],
    )


def seven_b_table(shape: Found | None) -> Table:
    """LLaVA-1.5-7B on data-sheet devices."""
    devices: list[Device] = list(DEVICES.values())
    measured = shape_ms(shape or {})
    ratios = list(measured) or [1.0, *PAPER_SPEEDUPS]
    found = costs(SHAPES[_SEVEN_B], devices, ratios, text_tokens=50, output_tokens=1, batch=_BATCH)
    rows = [
        [
            f"{each['ratio']:g}",
            f"{each['flops'] / 1e12:.2f}",
            f"{each['bytes'] / 1e9:.2f}",
            *(
                text
                for device in devices
                for text in (
                    f"{each['floor_ms'][device.name]:.2f}",
                    f"{each['posts_per_day'][device.name] / 1e6:.1f} M",
                )
            ),
            *([f"{measured[each['ratio']]:.0f}"] if measured else []),
        ]
        for each in found["ratios"]
    ]
    of_devices = [f"{device.name} {what}" for device in devices for what in ("ms", "posts/day")]
    headers = ["ratio", "TFLOP", "GB", *of_devices, *["ms on this CPU"] * bool(measured)]
    notes = [f"50 text tokens, one output token, {_BATCH} posts a step, bf16", *assumptions(found)]
    return Table(title="Cost of a post, LLaVA-1.5-7B", headers=headers, rows=rows, notes=notes)


def environment_table(environment: Found) -> Table:
    """What it ran on."""
    rows = [[name, _plain(value)] for name, value in environment.items()]
    return Table(title="Environment", headers=["what", "value"], rows=rows)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in value)
    return "-" if value is None else str(value)
