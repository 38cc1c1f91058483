"""What a sweep comes to: a row a cell, latency against load, drift, caches, cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.cells import Cell, dominated
from bench.cost import costs, sweep_ms
from bench.flops import Shape
from bench.generator import Request
from bench.latency import percentile_ms
from bench.outcome import Outcome
from bench.quality import Quality, qualities
from bench.report_tables import CELL_HEADERS, cell_rows
from bench.roofline import Device
from bench.statistics import Sample, paired_ratio
from bench.sweeping import Block, Found

MAX_DRIFT = 0.1
"""The first and the last block may differ by so much before the run is called into question."""
PERCENTILES = (50, 90, 95, 99)


def summarise(
    found: Found,
    cells: Sequence[Cell],
    shape: Shape,
    machine: Device,
    options: argparse.Namespace,
) -> Outcome:
    """The outcome of a sweep.

    Args:
        found: what was measured.
        cells: of the sweep, ratio 1.0 first.
        shape: of the checkpoint, for its cost.
        machine: that computed.
        options: of the command.
    """
    field, num_judged, quality = judged(found, cells, options.field)
    rows = [_cell(cell, cells[0], found, quality.get(cell.name)) for cell in cells]
    _mark_dominated(rows)
    results = {
        "cells": rows,
        "field": field,
        "num_judged": num_judged,
        "connections": found.connections,
        "levels": [
            {"name": cell.name, "connections": connections, "posts_per_s": rate}
            for cell, connections, rate in found.levels
        ],
        "latency": _latency(found),
        "drift": _drift(found),
        "caches": {"images": found.num_images, "tower_images": found.num_tower_images},
        "cost": _cost(rows, found, shape, machine),
    }
    return Outcome(
        title=f"Sweep of {_name(options)}: {len(cells)} cells, {options.rounds} runs each of "
        f"{len(found.blocks[0].rows)} posts, {found.connections} connections",
        headers=CELL_HEADERS,
        rows=cell_rows(rows),
        notes=_notes(results, options),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        results=results,
        samples=[
            Sample(round=block.round, variant=block.cell.name, seconds=block.seconds)
            for block in found.blocks
        ],
    )


def _name(options: argparse.Namespace) -> str:
    return f"{options.ask} on {Path(options.model).name}"


def _cell(cell: Cell, full: Cell, found: Found, quality: Quality | None) -> dict[str, Any]:
    blocks = found.of(cell)
    rows = [row for block in blocks for row in block.rows]
    answered = [row for row in rows if row.status == 200]
    seconds = [row.seconds for row in answered]
    _, search = found.searches.get(cell.name, (None, None))
    return {
        "name": cell.name,
        "ratio": cell.ratio,
        "selector": cell.selector,
        "kept": _mean([row.kept for row in answered]),
        "prompt_tokens": _mean([row.prompt_tokens for row in answered]),
        "output_tokens": _mean([row.completion_tokens for row in answered]),
        "posts_per_s": _estimate([block.posts_per_s for block in blocks]),
        "speedup": _speedup(blocks, found.of(full)),
        "goodput": None if search is None else search.goodput(),
        **{f"p{percent}_ms": percentile_ms(seconds, percent) for percent in PERCENTILES},
        "accuracy": quality and vars(quality.accuracy),
        "macro_f1": quality and vars(quality.macro_f1),
        "f1_minus_full": quality and vars(quality.f1_minus_reference),
        "requests": len(rows),
        "failures": len(rows) - len(answered),
        "dominated": False,
    }


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _estimate(rates: Sequence[float]) -> dict[str, float] | None:
    if not all(rates):
        return None
    found = paired_ratio(rates, [1.0] * len(rates))
    return {"median": found.median, "low": found.low, "high": found.high}


def _speedup(blocks: Sequence[Block], full: Sequence[Block]) -> dict[str, float] | None:
    """Over ratio 1.0 in the same round."""
    mine, theirs = ([block.posts_per_s for block in each] for each in (blocks, full))
    if not all([*mine, *theirs]):
        return None
    found = paired_ratio(mine, theirs)
    return {"median": found.median, "low": found.low, "high": found.high}


def judged(
    found: Found, cells: Sequence[Cell], asked: str | None
) -> tuple[str | None, int, dict[str, Quality]]:
    """Field, number of posts and quality by cell; of posts with a label that all cells answered."""
    answers = {cell.name: _answers(found.of(cell)) for cell in cells}
    fields = list(next((labels for labels in answers[cells[0].name].values()), {}))
    if not fields:
        return None, 0, {}
    field = asked or ("multimodal" if "multimodal" in fields else fields[-1])
    posts = [
        post.id
        for post in found.posts.values()
        if field in post.labels
        and all(field in given.get(post.id, {}) for given in answers.values())
    ]
    if not posts:
        return field, 0, {}
    known = [found.posts[post].labels[field] for post in posts]
    by_cell = {name: [given[post][field] for post in posts] for name, given in answers.items()}
    return field, len(posts), qualities(known, by_cell, cells[0].name)


def _answers(blocks: Sequence[Block]) -> dict[str, Mapping[str, str]]:
    rows: list[Request] = [row for block in blocks for row in block.rows]
    return {row.id: row.labels for row in rows}


def _mark_dominated(rows: Sequence[dict[str, Any]]) -> None:
    points = {
        row["name"]: (row["posts_per_s"]["median"], row["macro_f1"]["value"])
        for row in rows
        if row["posts_per_s"] and row["macro_f1"]
    }
    beaten = dominated(points)
    for row in rows:
        row["dominated"] = row["name"] in beaten


def _latency(found: Found) -> list[dict[str, Any]]:
    return [
        {"name": cell.name, "ratio": cell.ratio, "selector": cell.selector}
        | probe.as_json(search.goal)
        for cell, search in found.searches.values()
        for probe in sorted(search.probes, key=lambda probe: probe.rate)
    ]


def _drift(found: Found) -> dict[str, Any]:
    first, last = (block.posts_per_s for block in found.drift)
    change = last / first - 1 if first else float("inf")
    return {"first": first, "last": last, "change": change, "is_large": abs(change) > MAX_DRIFT}


def _cost(
    rows: Sequence[dict[str, Any]], found: Found, shape: Shape, machine: Device
) -> dict[str, Any] | None:
    full = rows[0]
    if not all((full["kept"], full["prompt_tokens"], full["output_tokens"], full["posts_per_s"])):
        return None
    measured = sweep_ms([row for row in rows if row["posts_per_s"]])
    return costs(
        shape,
        [machine],
        list(measured),
        text_tokens=round(full["prompt_tokens"] - full["kept"]),
        output_tokens=round(full["output_tokens"]),
        batch=found.connections,
        number_bytes=4 if "float32" in machine.source else 2,
        measured_ms=measured,
    )


def _notes(results: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    drift, caches = results["drift"], results["caches"]
    seen = caches["tower_images"]
    notes = [
        f"posts/s and percentiles: closed loop with {results['connections']} connections; posts/s "
        "is the median of the runs, with its bootstrap 95 % interval",
        f"drift: {drift['first']:.1f} posts/s at ratio 1.0 first, {drift['last']:.1f} last "
        f"({drift['change']:+.1%})"
        + (": LARGE, the machine changed meanwhile; run it again" if drift["is_large"] else ""),
        f"caches: prefix cache off; {'?' if seen is None else seen} of {caches['images']} images "
        "went through the tower",
    ]
    if results["num_judged"]:
        notes.append(
            f"macro-F1 of '{results['field']}' on {results['num_judged']} posts, the same for all "
            "cells; difference to 1.0 over the same draws of posts"
        )
    else:
        notes.append("no accuracy: no post has a known label of an answered field")
    if results["latency"]:
        notes.append(_goodput_note(results["latency"], options))
    return notes


def _goodput_note(latency: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    void = sum(bool(point["void"]) for point in latency)
    return (
        f"goodput: highest Poisson rate with {options.goal_share:.0%} of all requests answered "
        f"within {options.goal_ms:g} ms of when they were due, {options.probe} requests a rate; "
        f"{void} of {len(latency)} open loops were void (the generator fell behind) and were "
        "made again once"
    )
