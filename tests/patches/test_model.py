"""The model with its tower cache, on the shipped demo, without an engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patches.selection import SELECTORS, num_kept
from serving.settings import DEMO

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def steps():
    done = subprocess.run(
        [sys.executable, "-m", "tests.patches.model_alone", str(DEMO / "base")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_rows_are_the_same_to_the_bit_whether_or_not_the_tower_ran(steps):
    assert len(steps) == 4 * len(SELECTORS)
    for step in steps:
        assert step["worst"] == 0, step
        assert step["kept"] == [num_kept(64, step["ratio"])] * 3
        assert step["alone"] == 3


def test_an_image_goes_through_the_tower_once_whatever_ratios_and_selectors_ask_for_it(steps):
    assert steps[0]["run"] == 3
    assert sum(step["run"] for step in steps) <= 2 * 5  # once more for attention at the most
    assert all(step["run"] == 0 for step in steps if step["ratio"] in (1.0, 0.05))
