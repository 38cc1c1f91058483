"""`bench before`: whose code runs, what is asked of both, what the table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import before
from bench.__main__ import build_parser, main
from bench.before import ALONE, AT_ONCE, NOW, THEN
from bench.stage_points import DUMMY_VARIABLE, write_hook
from bench.stage_server import _of_checkout
from bench.statistics import Sample
from serving.schema import LabelRequest

ROOT = Path(__file__).resolve().parents[2]


def options(*argv):
    return build_parser().parse_args(["before", "--checkout", ".", *argv])


def samples(now, then, rounds=3):
    return [
        Sample(round=turn, variant=f"{load}/{side}", seconds=seconds * (1 + turn))
        for turn in range(rounds)
        for load in (ALONE, AT_ONCE)
        for side, seconds in ((NOW, now), (THEN, then))
    ]


def test_a_ratio_over_one_means_that_this_checkout_is_faster():
    outcome = before.summarise(samples(1.0, 1.5), 1e-9, options())
    for load in (ALONE, AT_ONCE):
        assert outcome.results[load]["faster"]["median"] == pytest.approx(1.5)
    assert [row[0] for row in outcome.rows] == [ALONE, AT_ONCE]
    assert any("within 1.0e-09" in note for note in outcome.notes)
    json.dumps(outcome.as_json())


def test_answers_that_were_not_compared_are_said_to_be():
    outcome = before.summarise(samples(1.0, 1.0), None, options("--labels", "0"))
    assert any("not compared" in note for note in outcome.notes)


def test_every_body_is_one_of_our_api_and_a_cascade_always_goes_up():
    plain = [LabelRequest(**json.loads(body)) for body in before._bodies(options(), 0, 3)]
    assert {body.retention_ratio for body in plain} == {0.4}
    assert len({tuple(body.images) for body in plain}) == 3
    (climbing,) = before._bodies(options("--cascade", "--retention", "0.2"), 0, 1)
    asked = LabelRequest(**json.loads(climbing))
    assert (list(asked.cascade), asked.confidence) == ([0.2, 1.0], 1.0)
    assert asked.retention_ratio is None


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    assert main(["before", "--checkout", str(tmp_path)]) == 2
    assert "no serving/ there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"), [([], "would be the same"), (["--variables", "OMP"], "NAME=VALUE")]
)
def test_sides_that_cannot_be_told_apart_are_refused(argv, word, capsys):
    assert main(["before", *argv]) == 2
    assert word in capsys.readouterr().err


def test_a_server_of_another_checkout_has_its_own_packages_and_our_hook(tmp_path):
    hook, other = tmp_path / "hook", tmp_path / "other"
    for package in ("serving", "bench"):
        (other / package).mkdir(parents=True)
        (other / package / "__init__.py").write_text("")
    hook.mkdir()
    engine = "def engine_args():\n    return type('Arguments', (), {})()\n"
    (other / "serving" / "engine.py").write_text(engine)
    needed = {**write_hook(hook, ROOT), DUMMY_VARIABLE: "1"}
    lines = (
        "import bench, serving.engine as e; "
        "print(bench.__file__, e.__file__, e.engine_args().load_format)"
    )
    found = subprocess.run(
        [sys.executable, "-c", lines],
        env={**os.environ, **needed, **_of_checkout(other, needed)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert found[:2] == [str(other / "bench/__init__.py"), str(other / "serving/engine.py")]
    assert found[2] == "dummy"
