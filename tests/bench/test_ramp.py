"""The ramp's schedule, generator, metrics and table; no engine and no Ray is started."""

import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bench import ramp
from bench.__main__ import build_parser, main
from bench.generator import Generator, Request, void_reasons, write_plan
from bench.profiles import BURSTINESS, PROFILES, SPACINGS, Arrival, Phase, schedule
from bench.ramp_plot import binned_p95, binned_rates, draw
from bench.watch import Look, events, read_look

RAMP = [
    Phase(name="up", seconds=100, start=0, end=20),
    Phase(name="flat", seconds=100, start=20, end=20),
    Phase(name="down", seconds=100, start=20, end=5),
]


def options(*argv):
    return build_parser().parse_args(["ramp", *argv])


def request(at_s, *, seconds=0.1, status=200, lag_s=0.0, phase="flat", dropped=False):
    return Request(
        number=0,
        phase=phase,
        intended_s=at_s,
        sent_s=at_s + lag_s,
        done_s=at_s + seconds,
        status=status,
        error="",
        is_dropped=dropped,
    )


def look(at_s, *, running=1, target=1, **decisions):
    return Look(
        at_s=at_s,
        running=running,
        target=target,
        visual_tokens=64.0,
        queue_wait_s=0.5,
        pending=1.0,
        decisions=decisions,
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_same_seed_gives_the_same_arrivals_in_order_and_within_their_phase(spacing):
    found = schedule(RAMP, 3, spacing)
    assert found == schedule(RAMP, 3, spacing)
    times = [arrival.at_s for arrival in found]
    assert times == sorted(times)
    bounds = {"up": (0, 100), "flat": (100, 200), "down": (200, 300)}
    assert all(bounds[each.phase][0] <= each.at_s <= bounds[each.phase][1] for each in found)


def test_another_seed_gives_other_poisson_arrivals():
    assert schedule(RAMP, 1) != schedule(RAMP, 2)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("phase", RAMP, ids=lambda phase: phase.name)
def test_each_part_of_a_phase_has_the_rate_asked(spacing, phase):
    times = np.array([arrival.at_s for arrival in schedule([phase], 0, spacing)])
    slope = (phase.end - phase.start) / phase.seconds
    for begin in range(0, 100, 25):
        expected = 25 * (phase.start + slope * (begin + 12.5))
        count = np.sum((times >= begin) & (times < begin + 25))
        spread = {"even": 0.0, "poisson": 1.0, "gamma": BURSTINESS}[spacing]
        slack = 1 + 4 * math.sqrt(spread * expected)
        assert abs(count - expected) <= slack


def test_poisson_gaps_vary_as_an_exponential_does_gamma_gaps_more_and_even_gaps_do_not():
    flat = [Phase(name="flat", seconds=1000, start=10, end=10)]
    gaps = {s: np.diff([a.at_s for a in schedule(flat, 0, s, 9.0)]) for s in SPACINGS}
    variation = {spacing: np.std(each) / np.mean(each) for spacing, each in gaps.items()}
    assert variation["poisson"] == pytest.approx(1.0, abs=0.05)
    assert variation["gamma"] == pytest.approx(3.0, abs=0.3)
    assert np.allclose(gaps["even"], 0.1)


def test_once_is_one_request_between_two_silences():
    phases = PROFILES["once"](options("--before-s", "30"))
    assert schedule(phases, 0) == [Arrival(at_s=30.0, phase="one request")]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_makes_requests_of_the_options_defaults(profile, tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"at_s": 2}\n{"at_s": 1.5}\n')
    phases = PROFILES[profile](options("--trace", str(tmp_path / "trace.jsonl")))
    arrivals = schedule(phases, 0)
    assert arrivals
    assert {arrival.phase for arrival in arrivals} <= {phase.name for phase in phases}


def test_importing_the_command_does_not_patch_this_process_for_gevent():
    script = "import sys, bench.ramp; assert not {'gevent', 'locust'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


class SlowServer(BaseHTTPRequestHandler):
    """Answers a label after half a second; every third post is refused."""

    protocol_version = "HTTP/1.1"
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append((time.monotonic(), body))
        time.sleep(0.5)
        is_refused = body["text"].endswith(("2", "5", "8"))
        answer = {"model": "demo", "retention": {"ratio": 0.5, "kept": 32}}
        raw = b"busy" if is_refused else json.dumps(answer).encode()
        self.send_response(429 if is_refused else 200)
        self.send_header("content-length", str(len(raw)))
        if is_refused:
            self.send_header("retry-after", "1")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def slow_server():
    SlowServer.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def send(folder, url, times_s, most_in_flight):
    write_plan(
        folder,
        url,
        [Arrival(at_s=at, phase="flat") for at in times_s],
        {"retention_ratio": 0.5},
        seed=0,
        picture_size=32,
        most_in_flight=most_in_flight,
        timeout_s=5,
    )
    generator = Generator(folder)
    try:
        generator.start()
        return generator.rows()
    finally:
        generator.stop()


def test_requests_go_out_when_due_though_none_is_answered_yet(tmp_path, slow_server):
    times_s = [0.04 * number for number in range(9)]
    rows = send(tmp_path, slow_server, times_s, most_in_flight=20)
    assert [row.intended_s for row in rows] == pytest.approx(times_s)
    assert all(row.sent_s >= row.intended_s for row in rows)
    arrived = [at for at, _ in SlowServer.seen]
    assert max(arrived) - min(arrived) < 0.5 + times_s[-1]  # a closed loop takes 4.5 s
    assert [row.status for row in rows] == [200, 200, 429] * 3
    assert all(row.seconds >= 0.5 for row in rows)
    images = {body["image"] for _, body in SlowServer.seen}
    assert len(images) == 9


def test_what_is_over_the_cap_is_dropped_and_counted_not_sent_later(tmp_path, slow_server):
    rows = send(tmp_path, slow_server, [0.01 * number for number in range(8)], most_in_flight=3)
    assert [row.is_dropped for row in rows] == [False] * 3 + [True] * 5
    assert len(SlowServer.seen) == 3
    assert any("3 of 8" in reason for reason in void_reasons(rows, 8))


def test_a_connection_that_is_refused_is_a_failure_with_its_reason(tmp_path):
    (row,) = send(tmp_path, "http://127.0.0.1:9", [0.0], most_in_flight=3)
    assert row.status == 0
    assert row.error
    assert not row.is_dropped


def test_a_run_whose_generator_kept_up_is_not_void():
    assert void_reasons([request(at) for at in range(100)], 100) == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([request(at, lag_s=0.006) for at in range(100)], "lag"),
        ([request(at, dropped=at < 3) for at in range(100)], "97 of 100"),
        ([request(at, status=503) for at in range(100)], "no request was answered"),
    ],
)
def test_a_run_whose_generator_fell_behind_is_void_and_says_why(rows, word):
    (reason,) = void_reasons(rows, 100)
    assert word in reason


EXPOSITION = """\
# TYPE sieve_replicas gauge
sieve_replicas{deployment="Coordinator",state="running"} 1.0
sieve_replicas{deployment="Coordinator",state="target"} 3.0
# TYPE sieve_autoscaling_decisions counter
sieve_autoscaling_decisions_total{reason="more_tokens",replica="c"} 2.0
# TYPE sieve_pending_requests gauge
sieve_pending_requests{deployment="Ingress",replica="a"} 2.0
sieve_pending_requests{deployment="Ingress",replica="b"} 3.0
sieve_autoscaling_visual_tokens{replica="c"} 640.0
sieve_autoscaling_queue_wait_seconds{replica="c"} 0.25
vllm:anything{x="}"} 1
"""


def test_a_scrape_is_read_and_summed_over_replicas():
    found = read_look(1.0, EXPOSITION)
    assert (found.running, found.target, found.pending) == (1, 3, 5.0)
    assert (found.visual_tokens, found.queue_wait_s) == (640.0, 0.25)
    assert found.decisions == {"more_tokens": 2}


def test_each_change_has_its_reason_also_where_that_is_counted_a_scrape_later():
    looks = [
        look(0),
        look(1, target=3),
        look(2, target=3, more_tokens=1),
        look(3, target=3, running=3, more_tokens=1),
        look(4, target=1, running=3, more_tokens=1, fewer_tokens=1, held_by_delay=1),
    ]
    found = [(event.at_s, event.what, event.reason) for event in events(looks)]
    assert found == [
        (1, "target 1 to 3", "more_tokens"),
        (3, "running 1 to 3", ""),
        (4, "held back", "held_by_delay"),
        (4, "target 3 to 1", "fewer_tokens"),
    ]


def summary(rows, looks):
    phases = [
        Phase(name="before", seconds=10, start=1, end=1),
        Phase(name="flat", seconds=10, start=10, end=10),
    ]
    arrivals = [Arrival(at_s=row.intended_s, phase=row.phase) for row in rows]
    return phases, ramp.summarise(options(), phases, arrivals, rows, looks)


def test_the_table_counts_by_phase_and_gives_no_p95_of_few():
    rows = [request(1 + i, phase="before", seconds=0.2) for i in range(5)]
    rows += [request(10 + 0.1 * i, seconds=0.1) for i in range(60)]
    rows += [request(17, status=code) for code in (429, 429, 503, 500, 0)]
    rows += [request(18, status=0, dropped=True)]
    looks = [look(5), look(12, target=3), look(15, target=3, running=2)]
    _, outcome = summary(rows, looks)
    before, flat = (dict(zip(outcome.headers, row, strict=True)) for row in outcome.rows)
    assert (before["p50"], before["p95"], before["n"]) == ("200", "-", 5)
    assert (flat["p50"], flat["p95"], flat["n"]) == ("100", "100", 60)
    assert [flat[name] for name in ("failed", "429", "503", "dropped")] == [2, 2, 1, 1]
    assert (flat["replicas"], flat["target"], before["replicas"]) == ("1 2", "3", "1")
    assert flat["asked/s"] == "6.6"
    assert "running 1 to 2" in outcome.markdown()
    json.dumps(outcome.as_json())


def test_a_void_run_says_so_first():
    _, outcome = summary([request(11 + i, lag_s=0.05) for i in range(5)], [look(1)])
    assert outcome.markdown().startswith("### VOID")


@pytest.mark.parametrize("kind", [".png", ".svg"])
def test_the_plot_is_written(tmp_path, kind):
    rows = [request(10 + 0.1 * i) for i in range(60)]
    phases, _ = summary(rows, [])
    path = tmp_path / f"ramp{kind}"
    draw(path, "a ramp", phases, rows, [look(1), look(12, running=3, target=3)])
    assert path.read_bytes().startswith(b"\x89PNG" if kind == ".png" else b"<?xml")


def test_bins_hold_what_was_due_in_them():
    rows = [request(0.5 * i, seconds=0.1 + (i == 25)) for i in range(40)]
    middles, rates = binned_rates([row.intended_s for row in rows], 20)
    assert (middles, rates) == ([2.5, 7.5, 12.5, 17.5], [2.0] * 4)
    assert binned_p95(rows, 20)[1] == pytest.approx([0.1, 0.1, 1.1, 0.1])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--plot", "ramp.gif"], ".png or .svg"),
        (["--plot", "nowhere/at/ramp.png"], "folder does not exist"),
        (["--keep", "nowhere"], "no such folder"),
        (["--low", "9", "--high", "3"], "above --high"),
        (["--checkpoint", "nowhere"], "config.json"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_a_server_starts(argv, word, capsys):
    assert main(["ramp", *argv]) == 2
    assert word in capsys.readouterr().err


def test_the_server_is_started_with_flags_that_its_command_line_knows():
    from serving.cli import parse_command

    server = ramp.ray_server(options("--replicas", "0-2"))
    assert list(server.arguments[:2]) == ["-m", "serving"]
    assert callable(parse_command(list(server.arguments[2:])))
