"""Joins the JSON of a sweep, and of stages, shape and peers where given, into one report.

  python -m bench report --sweep runs/sweep/report.json --stages stages.json --out runs/report

Writes report.md, report.html (one file: no script, no outside asset, light and dark), report.json
and cells.csv. It has the table of ratios, macro-F1 against posts/s with dominated points hollow,
latency against load, stage bars, speed-ups beside the paper's Table 4 and the FLOP model, peers,
what a post costs, the environment and the exact command. `bench sweep` writes the same by itself.
Goal: everything that a number needs to be believed, beside it. Options have no default but --out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report_plots as plots
from bench import report_tables as tables
from bench.outcome import BenchError, Outcome, progress
from bench.report_page import Figure, Section, page

Found = Mapping[str, Any]
OTHERS = {"stages": "ratios", "shape": "1.0", "peers": None}
"""What may stand beside a sweep, and a key that its results have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--sweep", type=Path, required=True, help="report.json or --json of `bench sweep`")
    for name in OTHERS:
        add(f"--{name}", type=Path, help=f"--json of `bench {name}`")
    add("--out", type=Path, default=Path("runs/report"), help="folder (default runs/report)")


def run(options: argparse.Namespace) -> Outcome:
    """Reads, joins, writes."""
    sweep = _read(options.sweep, "--sweep", "cells")
    others = {
        name: _read(path, f"--{name}", key)
        for name, key in OTHERS.items()
        if (path := getattr(options, name)) is not None
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out, sweep, others)
    progress(f"report: {options.out}/report.html, .md, .json; cells.csv")
    return Outcome(
        title=sweep["title"],
        headers=tables.CELL_HEADERS,
        rows=tables.cell_rows(sweep["results"]["cells"]),
        notes=sweep["notes"],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=sweep["results"] | {name: found["results"] for name, found in others.items()},
        samples=[],
    )


def _read(path: Path, flag: str, key: str | None) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        results = stored["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{flag} {path}: not a JSON that --json wrote: {error!r}") from error
    if key is not None and key not in results:
        raise BenchError(f"{flag} {path}: has no {key!r} in its results; is it another command's?")
    return stored


def write(folder: Path, sweep: Found, others: Mapping[str, Found] | None = None) -> None:
    """Writes a report of a stored sweep, and of what stands beside it, into a folder."""
    others = others or {}
    stored = {**sweep, **({"beside": dict(others)} if others else {})}
    (folder / "report.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(sweep, others), encoding="utf-8")
    (folder / "report.html").write_text(html(sweep, others), encoding="utf-8")
    with (folder / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        _write_cells(file, sweep["results"]["cells"])


def _write_cells(file: Any, cells: list[dict[str, Any]]) -> None:
    """A row a cell; a value with an interval is three columns."""
    rows = [_flat(cell) for cell in cells]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)


def _flat(found: Found, before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def markdown(sweep: Found, others: Mapping[str, Found]) -> str:
    """The report as text."""
    parts = [f"# {sweep['title']}", _lead(sweep)]
    parts += [table.markdown() for table in _tables(sweep, others).values()]
    parts.append(f"## Command\n\n    {sweep['environment']['command']}\n")
    return "\n\n".join(parts)


def _tables(sweep: Found, others: Mapping[str, Found]) -> dict[str, tables.Table]:
    results, shape = sweep["results"], _results(others, "shape")
    found = {"ratios": tables.ratio_table(sweep)}
    found["speedups"] = tables.speedup_table(results, shape)
    if results["latency"]:
        found["latency"] = tables.latency_table(results)
    if "stages" in others:
        found["stages"] = tables.stage_tables(others["stages"]["results"])
    if "peers" in others:
        found["peers"] = tables.peer_table(others["peers"]["results"])
    if results["cost"]:
        found["cost"] = tables.cost_table(results["cost"])
    found["7b"] = tables.seven_b_table(shape)
    found["environment"] = tables.environment_table(sweep["environment"])
    return found


def _results(others: Mapping[str, Found], name: str) -> Found | None:
    return others[name]["results"] if name in others else None


def html(sweep: Found, others: Mapping[str, Found]) -> str:
    """The report as a page."""
    results = sweep["results"]
    goals = [cell["goodput"]["goal_ms"] for cell in results["cells"] if cell["goodput"]]
    pictures = {"latency": plots.latency(results["latency"], goals[0] if goals else None)}
    if any(cell["macro_f1"] and cell["posts_per_s"] for cell in results["cells"]):
        pictures["ratios"] = plots.pareto(results["cells"])
    if "stages" in others:
        pictures["stages"] = plots.stages(others["stages"]["results"])
    sections = [
        Section(
            title=table.title,
            picture=pictures.get(name, ""),
            table=table,
            is_wide=name == "environment",
        )
        for name, table in _tables(sweep, others).items()
    ]
    command = sweep["environment"]["command"]
    return page(sweep["title"], _lead(sweep), command, _figures(results["cells"]), sections)


def _lead(sweep: Found) -> str:
    environment = sweep["environment"]
    cores = environment["cores"]
    return (
        f"{environment['started']}, {environment['cpu']}, {len(cores)} cores, commit "
        f"{environment['commit']}"
    )


def _figures(cells: list[dict[str, Any]]) -> list[Figure]:
    """Each ratio of the first selector: how much faster, and at what price."""
    first = cells[0]["selector"]
    return [
        Figure(
            name=f"ratio {cell['ratio']:g}",
            value=f"{cell['speedup']['median']:.2f} x",
            remark=_price(cell),
        )
        for cell in cells[1:]
        if cell["selector"] == first and cell["speedup"]
    ]


def _price(cell: Found) -> str:
    speed = f"{cell['posts_per_s']['median']:.0f} posts/s"
    if cell["f1_minus_full"] is None:
        return speed
    return f"{speed}, F1 {tables.interval(cell['f1_minus_full'], '+.3f')}"
