"""How the outages bench sorts what it saw; nothing here starts a server."""

import os
import subprocess
import sys

import pytest

from bench import answers
from bench.__main__ import build_parser
from bench.answers import Answer
from bench.outages import PARTS, Look, Run, sort_out, summarise
from bench.outcome import BenchError
from bench.process_tree import worker_of


def answer(outcome, detail="", at_s=1.0):
    return Answer(kind="base", at_s=at_s, seconds=0.1, outcome=outcome, detail=detail)


@pytest.mark.parametrize(
    ("outcome", "detail", "kind"),
    [
        (answers.OK, "", "ok"),
        (answers.REFUSED, "503 engine_restarting", "told"),
        (answers.BROKEN, "engine_restarting", "told"),
        (answers.BROKEN, "draining", "told"),
        (answers.BROKEN, "ended early", "lost"),
        (answers.CRASHED, "503 engine_crashed", "told"),
        (answers.CRASHED, "400 quarantined", "lost"),
        (answers.FAILED, "500", "lost"),
        (answers.CONNECTION, "ConnectError('refused')", "gone"),
        (answers.CONNECTION, "ReadError('')", "lost"),
    ],
)
def test_only_what_may_come_again_or_met_no_server_is_not_lost(outcome, detail, kind):
    found = sort_out([answer(outcome, detail)])
    assert {name for name, number in found.items() if number} == {kind}


def test_the_table_tells_before_the_signal_from_after_it():
    options = build_parser().parse_args(["outages", "--parts", "drain"])
    seen = [
        answer(answers.OK, at_s=1.0),
        answer(answers.REFUSED, "503 draining", at_s=3.0),
        answer(answers.CONNECTION, "ConnectError('refused')", at_s=4.0),
    ]
    run = Run(
        part="drain",
        answers=seen,
        struck_s=2.0,
        noticed_s=2.1,
        over_s=3.5,
        left=0,
        lag_s=0.0,
        dropped=0,
        looks=[Look(at_s=1.0, is_ready=True, health_ms=1.0)],
    )
    outcome = summarise([run], options)
    assert outcome.rows[0][:9] == ["drain", 3, 1, 1, 1, 0, "0.1", "1.5", 0]
    assert "drain: sent before SIGTERM 1 ok" in outcome.notes
    assert "drain: sent after it 1 told, 1 gone" in outcome.notes
    assert "goal, nothing lost: met" in outcome.notes


def test_every_part_is_run_by_default_and_a_process_without_a_worker_is_an_error():
    assert build_parser().parse_args(["outages"]).parts == list(PARTS)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(BenchError, match="no worker"):
            worker_of(process.pid)
        process.stdin.close()
    assert os.getpid() != process.pid
