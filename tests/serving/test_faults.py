"""Engines that die under load, on a Ray of two nodes: what their clients are told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRILLS = ["replica", "engine", "poison"]

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def drills(tmp_path_factory):
    """One start for all: half a minute of load around each drill, five minutes in all."""
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "bench", "faults", "--drills", *DRILLS]
    done = subprocess.run(
        [*command, "--before", "8", "--after", "8", "--json", path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("### Faults")
    results = json.loads(path.read_text())["results"]
    return {found["drill"]: found for found in results.values()}


@pytest.mark.parametrize("name", DRILLS)
def test_no_accepted_request_is_lost_and_the_engine_comes_back(drills, name):
    found = drills[name]
    counts = found["counts"]
    assert counts["ok"] > 100
    problems = [answer for answer in found["answers"] if answer["outcome"] not in ("ok", "broken")]
    lost = [answer for answer in problems if answer["outcome"] in ("failed", "connection")]
    assert lost == []
    assert counts["refused"] == 0, problems
    assert found["recovered_s"] is not None
    assert found["left"] == 0
    assert found["dropped"] == 0


@pytest.mark.parametrize("name", ["replica", "engine"])
def test_requests_of_a_killed_engine_are_answered_by_another(drills, name):
    assert drills[name]["retried"] > 0
    assert drills[name]["counts"]["crashed"] == 0


def test_a_poison_costs_one_engine_a_sending_and_is_refused_in_the_end(drills):
    notes = " ".join(drills["poison"]["notes"])
    sendings = re.findall(r"sending \d: (\d+) (\w+), (\d+) engine", notes)
    assert sendings[-1] == ("400", "quarantined", "0"), notes
    assert len(sendings) <= 3
    assert {deaths for _, _, deaths in sendings[:-1]} == {"1"}, notes
    assert {code for _, code, _ in sendings} <= {"engine_crashed", "quarantined"}


def test_only_company_of_the_poison_hears_of_the_crash(drills):
    assert drills["poison"]["counts"]["crashed"] <= 2 * 8  # an engine holds 8, two sendings
