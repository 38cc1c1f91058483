"""What a command hands back: a table, notes under it, and everything it was made from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.statistics import Sample
from bench.tables import markdown_table


class BenchError(Exception):
    """An argument or a machine that a measurement cannot be made with; says the fix."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One measurement.

    Attributes:
        title: what was measured, with its sizes.
        headers: of the table.
        rows: of the table.
        notes: one line each, printed under the table.
        settings: what the run was made with, for the JSON.
        results: the numbers of the table, for the JSON.
        samples: every timed call.
        status: the command's exit status; not 0 where what was measured is a fault.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str]
    settings: Mapping[str, object]
    results: Mapping[str, object]
    samples: Sequence[Sample]
    status: int = 0

    def markdown(self) -> str:
        """Title, table and notes."""
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"### {self.title}\n\n{markdown_table(self.headers, self.rows)}\n{notes}"

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "title": self.title,
            "settings": dict(self.settings),
            "results": dict(self.results),
            "notes": list(self.notes),
            "samples": [asdict(sample) for sample in self.samples],
        }


def progress(line: str) -> None:
    """A line for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
