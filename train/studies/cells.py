"""The cells of a study: each runs once, its result is kept, a stopped study goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from serving.errors import ConfigError
from train.files import write_json

Result = Mapping[str, Any]
Kind = Literal["training", "evaluation", "baseline"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training, one evaluation, or a baseline that is fitted and asked.

    Attributes:
        name: also its file's.
        kind: what it is, to guess how long those to come will take.
        work: does it; what it returns goes into JSON.
    """

    name: str
    kind: Kind
    work: Callable[[], dict[str, Any]]


def run_cells(cells: Sequence[Cell], folder: Path) -> dict[str, Result]:
    """Results of all cells by name; those that are on disk are not run again.

    A line a cell goes to stderr. Cells run in order, so a training stands before its evaluations.

    Raises:
        ConfigError: a result on disk cannot be read.
    """
    assert len({cell.name for cell in cells}) == len(cells), "two cells of one name"
    paths = {cell.name: folder / f"{cell.name}.json" for cell in cells}
    done = {name: _read(path) for name, path in paths.items() if path.exists()}
    _say(f"{_count(cells)}; {len(done)} of {len(cells)} cells are there already")
    for index, cell in enumerate(cells):
        if cell.name in done:
            continue
        started = time.perf_counter()
        content = cell.work()
        seconds = round(time.perf_counter() - started, 3)
        write_json(paths[cell.name], {"kind": cell.kind, "seconds": seconds, **content})
        done[cell.name] = _read(paths[cell.name])
        left = _left([one for one in cells if one.name not in done], done)
        _say(f"cell {index + 1} of {len(cells)}, {cell.name}: {seconds:.1f} s; {left}")
    return {cell.name: done[cell.name] for cell in cells}


def _read(path: Path) -> Result:
    try:
        content: Result = json.loads(path.read_text(encoding="utf-8"))
        content["kind"], content["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a cell's result; delete it to run it again") from error
    return content


def _left(cells: Sequence[Cell], done: Mapping[str, Result]) -> str:
    """Time that cells will take if they are like those of their kind so far."""
    if not cells:
        return "all done"
    total = 0.0
    for kind in KINDS:
        seconds = [one["seconds"] for one in done.values() if one["kind"] == kind]
        coming = sum(cell.kind == kind for cell in cells)
        if coming and not seconds:
            return f"{_count(cells)} left"
        total += coming * sum(seconds) / max(1, len(seconds))
    said = f"{total:.0f} s" if total < 100 else f"{total / 60:.0f} min"
    return f"about {said} left"


def _count(cells: Sequence[Cell]) -> str:
    counts = {kind: sum(cell.kind == kind for cell in cells) for kind in KINDS}
    return ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in counts.items() if n)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
