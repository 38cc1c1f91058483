"""`bench overload` and `bench checks`: what an answer counts as, and what their tables say."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bench import checks, overload
from bench.__main__ import build_parser
from bench.health import HealthWatch
from bench.overload import BUSY, DEADLINE, FULL, OK, OTHER, Answer, Phase, judged
from bench.statistics import Sample


@pytest.mark.parametrize(
    ("status", "said", "text", "outcome"),
    [
        (200, "", "{}", OK),
        (429, "3", "", BUSY),
        (503, "3", '{"error": {"code": "overloaded"}}', FULL),
        (503, "3", '{"error": {"code": "deadline_exceeded"}}', DEADLINE),
        (503, "", "", OTHER),
        (429, "soon", "", OTHER),
        (500, "3", "", OTHER),
        (400, "", "", OTHER),
    ],
)
def test_a_refusal_counts_as_one_only_with_the_time_to_come_again(status, said, text, outcome):
    answer = judged(status, said, text, 1.5)
    assert (answer.outcome, answer.seconds) == (outcome, 1.5)
    assert (answer.retry_after_s == 3) == (outcome in (BUSY, FULL, DEADLINE))


def phase(*answers, health_ms=(1.0,), lag_s=0.0):
    return Phase(
        load=2, rate=10, answers=list(answers), health_ms=list(health_ms), rss=(1, 2), lag_s=lag_s
    )


ANSWERED = Answer(outcome=OK, seconds=1.0)
REFUSED = Answer(outcome=BUSY, seconds=0.01, retry_after_s=4)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (phase(ANSWERED, REFUSED), "goal met"),
        (phase(ANSWERED, Answer(outcome=OTHER, seconds=1, detail="500")), "goal missed"),
        (phase(ANSWERED, Answer(outcome=DEADLINE, seconds=1, retry_after_s=1)), "goal missed"),
        (phase(Answer(outcome=OK, seconds=21.0)), "goal missed"),
        (phase(REFUSED), "goal missed"),
        (phase(ANSWERED, health_ms=(1.0, float("inf"))), "goal missed"),
        (phase(ANSWERED, lag_s=5.0), "void"),
    ],
    ids=["well", "other", "deadline", "late", "nobody answered", "unhealthy", "slow generator"],
)
def test_the_goal_of_overload_is_met_only_where_all_of_it_is(found, word):
    options = build_parser().parse_args(["overload"])
    outcome = overload.summarise([found], 5.0, options)
    assert word in outcome.notes[0]
    assert f"| {len(found.answers)} |" in " ".join(outcome.markdown().split())


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "met"), (1.02, "met"), (1.1, "missed")])
def test_the_cost_of_checks_is_a_paired_ratio(slower, verdict):
    samples = [
        Sample(round=index, variant=side, seconds=float(1 + index) * factor)
        for index in range(8)
        for side, factor in (("on", slower), ("off", 1.0))
    ]
    outcome = checks.summarise(samples, build_parser().parse_args(["checks"]))
    assert np.isclose(outcome.results["ratio"]["median"], 1 / slower)
    assert f"is {verdict}" in outcome.notes[0]


def test_health_is_watched_from_a_process_of_its_own():
    class Answer(BaseHTTPRequestHandler):
        is_green = True

        def do_GET(self):
            self.send_response(200 if Answer.is_green else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            looked.release()

        def log_message(self, *_):
            pass

    looked = threading.Semaphore(0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with HealthWatch(f"http://127.0.0.1:{server.server_port}") as health:
            assert looked.acquire(timeout=30)
            Answer.is_green = False
            assert looked.acquire(timeout=30)
            assert looked.acquire(timeout=30)
        server.shutdown()
    assert health.looks_ms[0] < float("inf")
    assert health.looks_ms[-1] == float("inf")
