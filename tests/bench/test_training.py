"""The command on a tiny model, both trainings in this process; nothing here looks at a clock."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import fits, plain_training, training
from bench.__main__ import build_parser, main
from bench.fits import OURS, THEIRS, Ended, Fit, ended_by_sigterm, run_python
from bench.flops import Shape
from bench.outcome import BenchError
from train.__main__ import main as train_main

TINY = (
    *("training", "--rounds", "2", "--posts", "6", "--batch-size", "4", "--micro-batch-size", "2"),
    *("--image-size", "56", "--tower-layers", "2", "--tower-width", "64"),
    *("--layers", "2", "--width", "64"),
)


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings without a process each; a test may change what the plain script is told."""
    told, threads = {}, torch.get_num_threads()

    def run(arguments, log, num_threads):
        _, module, *rest = arguments
        if module == "train":
            assert train_main(rest) == 0
        else:
            path = Path(rest[0])
            path.write_text(json.dumps(json.loads(path.read_text()) | told))
            plain_training.main(path)
        return Ended(seconds=1.0, cpu=1.0, peak=2**30)

    monkeypatch.setattr(fits, "run_python", run)
    yield told
    torch.set_num_threads(threads)


def test_both_have_the_same_loss_at_every_step(in_this_process, tmp_path, capsys):
    stored = tmp_path / "training.json"
    assert main([*TINY, "--json", str(stored)]) == 0
    printed = capsys.readouterr().out
    assert "posts/s, loaded" in printed
    found = json.loads(stored.read_text())
    check = found["results"]["check"]
    assert len(check[OURS]) == training.CHECK_STEPS
    assert check[OURS] == pytest.approx(check[THEIRS], abs=1e-3)
    assert check[OURS][-1] < check[OURS][0] - 0.05  # a loss that moves
    assert found["results"]["curves"]["steps"] == [1, 2, 3, 4]
    assert len(found["samples"]) == 2 * 2 * len(training.CLOCKS)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"schedule": "constant"}, {"seed": 1}])
def test_nothing_is_timed_where_the_losses_differ(in_this_process, capsys, change):
    in_this_process.update(change)
    assert main([*TINY]) == 2
    assert "not the same training" in capsys.readouterr().err


@pytest.mark.long
def test_the_command_measures_two_processes(tmp_path):
    stored = tmp_path / "training.json"
    assert main([*TINY, "--json", str(stored)]) == 0
    results = json.loads(stored.read_text())["results"]
    for side in (OURS, THEIRS):
        for found in results["fits"][side]:
            assert 0 < found["loop"] <= found["loaded"] < found["whole"]
            assert 2**28 < found["peak"] < 2**34


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--rounds", "1"], "noise"),
        (["--batch-size", "6", "--micro-batch-size", "4"], "multiple"),
        (["--tower-layers", "1"], "starts at 2"),
        (["--width", "100"], "64"),
        (["--image-size", "100"], "14"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_written(argv, word, capsys):
    assert main(["training", *argv]) == 2
    assert word in capsys.readouterr().err


def test_a_process_is_measured_by_itself_and_not_by_what_its_parent_holds(tmp_path):
    held = bytearray(150 << 20)
    wait = "import time; time.sleep(0.5)"
    small = run_python(["-c", wait], tmp_path / "log", num_threads=1)
    script = f"a = bytearray(200 << 20); {wait}"
    large = run_python(["-c", script], tmp_path / "log", num_threads=1)
    assert 0 < small.peak < 100 << 20 < len(held)
    assert 190 << 20 < large.peak - small.peak < 210 << 20
    assert small.seconds > 0.5 > small.cpu > 0


def test_a_termination_stops_the_training_of_the_moment(tmp_path):
    ours = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    ours.start()
    note = tmp_path / "pid"
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt), ended_by_sigterm():
        run_python(["-c", script], tmp_path / "log", num_threads=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_process_that_fails_is_reported_with_its_log(tmp_path):
    script = "import os, sys; sys.exit('out of luck on ' + os.environ['OMP_NUM_THREADS'])"
    with pytest.raises(BenchError, match="out of luck on 3"):
        run_python(["-c", script], tmp_path / "log", num_threads=3)


def a_fit(seconds, *, shift=0.0):
    losses = {step: 10.0 - step + shift for step in range(1, 5)}
    return Fit(
        whole=seconds + 8, loaded=seconds, loop=seconds / 2, cpu=seconds, peak=2**30, losses=losses
    )


def test_the_ratio_is_their_seconds_over_ours():
    runs = {OURS: [a_fit(1.0), a_fit(2.0)], THEIRS: [a_fit(2.0), a_fit(4.0)]}
    checked = {OURS: [1.0, 0.5], THEIRS: [1.0, 0.5004]}
    outcome = training.summarise(runs, checked, 40, build_parser().parse_args([*TINY]))
    assert outcome.results["loaded"]["ratio"]["median"] == pytest.approx(2.0)
    assert [row[-1] for row in outcome.rows] == ["yes", "", "", "", ""]
    assert "0.0004" in outcome.notes[0]


def test_curves_are_compared_at_our_steps_and_a_shifted_one_is_beyond_chance():
    ours = [a_fit(1.0, shift=0.01 * i) for i in range(5)]
    # As a log of every second step has them.
    ours = [replace(one, losses={s: one.losses[s] + 0.5 for s in (2, 4)}) for one in ours]
    plain = [a_fit(1.0, shift=0.01 * i) for i in range(5)]
    same = training.compare_curves({OURS: ours, THEIRS: plain})
    assert same["steps"] == [2, 4]
    assert same["distance"] == pytest.approx(0.0)
    assert same["p"] == pytest.approx(1.0)
    apart = [a_fit(1.0, shift=1 + 0.01 * i) for i in range(5)]
    shifted = training.compare_curves({OURS: ours, THEIRS: apart})
    assert shifted["distance"] == pytest.approx(1.0)
    assert shifted["p"] < 0.05
    assert "MORE THAN chance" in training.describe_curves(shifted)


def test_the_flop_model_gains_with_epochs_and_says_that_7b_gains_little():
    small = training.shape_of(build_parser().parse_args([*TINY]))
    once, often = (training.modelled_ratio(small, 40, epochs) for epochs in (1, 5))
    assert 1 < once < often
    assert 1 < training.modelled_ratio(Shape(), 60, 1) < 1.1
