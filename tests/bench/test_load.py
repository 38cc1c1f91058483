"""`bench load`: profiles, mixes, senders with the real Locust, and the file for its web UI."""

import csv
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from bench import mix
from bench.__main__ import build_parser, main
from bench.generator import Planned, Request, Senders, Sending, read_rows, write_requests
from bench.latency import Share, least_samples, percentile_ms
from bench.locust_arrivals import Call, read
from bench.outcome import BenchError
from bench.processes import free_port
from bench.profiles import PROFILES, read_trace
from serving.schema import ChatRequest, LabelRequest, LabelResponse
from tests.bench.load_target import LABELS, load_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def target():
    with load_target() as found:
        yield found


def options(*argv):
    return build_parser().parse_args(["load", "http://127.0.0.1:9", *argv])


# Percentiles and shares


@pytest.mark.parametrize(("percent", "least"), [(90, 64), (99, 662)])
def test_a_percentile_needs_as_many_answers_as_mlperf_says(percent, least):
    assert least_samples(percent) == least
    assert percentile_ms([0.1] * (least - 1), percent) is None
    assert percentile_ms([0.1] * least, percent) == pytest.approx(100)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (100, 100, 0.9630, 1.0)],
)
def test_a_share_has_wilsons_interval(hits, count, low, high):
    share = Share(hits=hits, count=count)
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_wilsons_interval_covers_the_true_share_about_as_often_as_it_says():
    hits = np.random.default_rng(0).binomial(128, 0.95, 2000)
    covered = [Share(hits=int(n), count=128) for n in hits]
    assert 0.93 <= np.mean([share.low <= 0.95 <= share.high for share in covered]) <= 0.98


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (3, 2), (-1, 4)])
def test_what_is_no_share_is_refused(hits, count):
    with pytest.raises(ValueError, match="no share"):
        Share(hits=hits, count=count)


# Profiles


def test_steps_go_from_low_to_high():
    phases = PROFILES["step"](options("--low", "2", "--high", "8", "--steps", "3"))
    assert [(phase.start, phase.end) for phase in phases] == [(2, 2), (5, 5), (8, 8)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"at_s": 12}\n{"at_s": 10}\n{"at_s": 10.5}\n'),
        ("requests.csv", "number,intended_s\n0,10\n1,10.5\n2,12\n"),
    ],
)
def test_a_trace_is_replayed_from_its_first_request_on(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_trace(tmp_path / name).tolist() == [0.0, 0.5, 2.0]
    phases = PROFILES["trace"](options("--trace", str(tmp_path / name), "--trace-speed", "2"))
    assert phases[0].at_s == (0.0, 0.25, 1.0)


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "one row"), ('{"at_s": "soon"}\n', "'soon'"), ("{]", "line 1"), ("[1]\n", "seconds")],
)
def test_a_trace_that_is_none_is_refused_with_its_place(tmp_path, text, word):
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(BenchError, match=word):
        read_trace(tmp_path / "trace.jsonl")


# What is sent


def test_a_mix_draws_the_same_for_the_same_seed_and_a_value_named_twice_more_often():
    chosen = mix.Mix(adapters=("llavac", None), ratios=(1.0, 0.4, 0.4))
    first, again = (list(itertools.islice(chosen.draws(3), 600)) for _ in range(2))
    assert first == again
    share = sum(each["retention_ratio"] == 0.4 for each in first) / 600
    assert share == pytest.approx(2 / 3, abs=0.06)
    assert {each.get("model") for each in first} == {"llavac", None}


def test_bodies_are_what_the_server_takes():
    chosen = mix.Mix(adapters=("demo",), ratios=(0.4,), structures=("llavac",))
    posts = mix.contents(options())
    for model, schema in ((None, LabelRequest), ("demo", ChatRequest)):
        (found,) = mix.bodies(itertools.islice(posts, 1), chosen, 0, model)
        request = schema.model_validate(found[1])
        assert (request.model, request.retention_ratio) == ("demo", 0.4)
        assert request.label_structure == "llavac"


def test_posts_of_a_folder_come_round_again_and_noise_never_does(tmp_path):
    from bench.pictures import picture

    for name in ("a", "b"):
        picture(0, ord(name), (8, 8)).save(tmp_path / f"{name}.png")
    found = list(itertools.islice(mix.contents(options("--data", str(tmp_path))), 4))
    assert [each.id for each in found] == ["a", "b", "a", "b"]
    noise = list(itertools.islice(mix.contents(options("--picture-size", "8")), 4))
    assert len({each.images for each in noise}) == 4


def test_data_without_posts_is_refused(tmp_path):
    (tmp_path / "posts.jsonl").write_text("")
    with pytest.raises(BenchError, match="posts"):
        mix.read_contents(str(tmp_path / "posts.jsonl"))


# Processes that send


def plan(folder, url, count, **sending):
    folder.mkdir(exist_ok=True)
    planned = [
        Planned(body={"text": str(n), "retention_ratio": 0.5}, at_s=0.02 * n, phase="p", id=f"i{n}")
        for n in range(count)
    ]
    write_requests(folder, planned, Sending(url=url, timeout_s=10, **sending))
    return folder


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_schedule_is_split_among_processes_and_its_rows_are_one_table(
    tmp_path, target, num_processes
):
    with Senders(tmp_path / "log", num_processes) as senders:
        rows = senders.send(plan(tmp_path / "a", target.url, 10))
        again = senders.send(plan(tmp_path / "b", target.url, 4))
    assert [row.number for row in rows] == list(range(10))
    assert [row.id for row in rows] == [f"i{n}" for n in range(10)]
    assert sorted(int(body["text"]) for body in target.bodies[:10]) == list(range(10))
    assert len(again) == 4
    assert read_rows(tmp_path / "a" / "requests.csv") == rows


def test_a_row_has_all_that_is_known_of_a_request(tmp_path, target):
    with Senders(tmp_path / "log") as senders:
        (row,) = senders.send(plan(tmp_path / "a", target.url, 1))
    assert (row.adapter, row.ratio, row.kept, row.prompt_tokens) == ("demo", 0.5, 32, 52)
    assert (row.structure, row.selector, row.phase) == ("sentiment", "cls", "p")
    assert row.labels == LABELS
    assert 0 <= row.intended_s <= row.sent_s <= row.first_byte_s <= row.done_s


def test_a_closed_loop_has_no_more_at_once_than_connections_and_sends_everything(tmp_path, target):
    target.wait_s = 0.02
    sending = {"loop": "closed", "most_in_flight": 5}
    with Senders(tmp_path / "log", 2) as senders:
        rows = senders.send(plan(tmp_path / "a", target.url, 40, **sending))
    assert target.most_at_once == 5
    assert [row.status for row in rows] == [200] * 40
    assert all(row.lag_s == 0 for row in rows)


def test_the_cap_on_what_is_in_flight_is_that_of_all_processes(tmp_path, target):
    target.wait_s = 1.0
    with Senders(tmp_path / "log", 2) as senders:
        rows = senders.send(plan(tmp_path / "a", target.url, 10, most_in_flight=3))
    assert len(target.bodies) == 3
    assert sum(row.is_dropped for row in rows) == 7


def test_a_stream_has_its_first_byte_before_its_end_and_its_text(tmp_path, target):
    chosen = mix.Mix(ratios=(0.4,))
    posts = mix.contents(options("--picture-size", "16"))
    bodies = mix.bodies(itertools.islice(posts, 3), chosen, 0, "demo")
    sending = Sending(url=target.url, path="/v1/chat/completions")
    write_requests(tmp_path, [Planned(body=body, id=post) for post, body in bodies], sending)
    with Senders(tmp_path / "log") as senders:
        rows = senders.send(tmp_path)
    assert [row.label for row in rows] == ["positive"] * 3
    assert [row.prompt_tokens for row in rows] == [33] * 3
    assert all(row.done_s - row.first_byte_s >= 0.1 for row in rows)


def test_a_stream_that_ends_early_is_a_failure(tmp_path, target):
    target.is_cut = True
    body = {"model": "demo", "stream": True}
    write_requests(tmp_path, [Planned(body=body)], Sending(url=target.url))
    with Senders(tmp_path / "log") as senders:
        (row,) = senders.send(tmp_path)
    assert row.status == 0
    assert "ended early" in row.error


def test_senders_that_fail_name_their_log(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with (
        Senders(tmp_path / "generator.log") as senders,
        pytest.raises(BenchError, match="generator.log"),
    ):
        senders.send(tmp_path)


# The command


def test_the_command_prints_phases_and_writes_every_request(tmp_path, target, capsys):
    argv = ["load", target.url, "--high", "40", "--plateau-s", "2", "--spacing", "even"]
    argv += ["--ratios", "1.0", "0.25", "--adapters", "demo", "--picture-size", "16"]
    argv += ["--keep", str(tmp_path), "--json", str(tmp_path / "load.json")]
    assert main(argv) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert set(found) == {"environment", "title", "settings", "results", "notes", "samples"}
    (phase,) = found["results"]["phases"]
    assert (phase["n"], phase["failed"], phase["p99"]) == (80, 0, None)
    assert phase["p90"] is not None
    asked = found["results"]["asked"]
    assert [(each["ratio"], each["kept"]) for each in asked] == [("0.25", 16.0), ("1.0", 64.0)]
    assert sum(each["n"] for each in asked) == 80
    with (tmp_path / "requests.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 80
    assert "0.25" in capsys.readouterr().out


def test_saturation_stops_where_more_connections_give_no_more(tmp_path, target, capsys):
    target.places, target.wait_s = threading.Semaphore(2), 0.05
    argv = ["load", target.url, "--mode", "saturation", "--seconds", "1", "--picture-size", "16"]
    assert main([*argv, "--json", str(tmp_path / "load.json")]) == 0
    phases = json.loads((tmp_path / "load.json").read_text())["results"]["phases"]
    names = [phase["phase"] for phase in phases]
    assert names[:2] == ["1 connections", "2 connections"]
    assert len(names) <= 5


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--profile", "trace"], "--trace"),
        (["--keep", "nowhere"], "no such folder"),
        (["--data", "nowhere"], "does not exist"),
        (["--stream"], "is it running"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_the_fix(argv, word, capsys):
    assert main(["load", "http://127.0.0.1:9", *argv]) == 2
    assert word in capsys.readouterr().err


def test_rows_without_labels_have_none():
    row = Request(
        number=0,
        phase="",
        intended_s=0,
        sent_s=0,
        done_s=1,
        status=503,
        error="busy",
        is_dropped=False,
    )
    assert row.labels == {}


def test_locusts_own_command_runs_the_locustfile_in_open_loop(tmp_path, target):
    target.wait_s = 0.5
    locust = [sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--headless"]
    run = ["-u", "2", "-r", "2", "-t", "4s", "--host", target.url, "--csv", str(tmp_path / "out")]
    ours = ["--rate", "10", "--ratios", "0.5", "--posts", "5", "--picture-size", "16"]
    subprocess.run([*locust, *run, *ours], cwd=ROOT, check=True, timeout=120, capture_output=True)
    with (tmp_path / "out_stats.csv").open() as file:
        found = {row["Name"]: row for row in csv.DictReader(file)}
    assert {"service", "from arrival", "first byte"} <= set(found)
    count = int(found["from arrival"]["Request Count"])
    assert count <= len(target.bodies)  # Locust does not wait for what is in flight at the end
    assert count > 2 * 4 / 0.5  # what two users that wait for answers could send
    assert float(found["from arrival"]["Failure Count"]) == 0
    assert all(body["retention_ratio"] == 0.5 for body in target.bodies)


def test_the_locustfiles_web_page_shows_its_options(target):
    port = free_port()
    locust = [sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--host", target.url]
    web = ["--web-host", "127.0.0.1", "--web-port", str(port)]
    with subprocess.Popen([*locust, *web], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("Starting web interface" in line for line in process.stderr)
            assert "most_in_flight" in _page(f"http://127.0.0.1:{port}/")
        finally:
            process.terminate()


def _page(url):
    for _ in range(100):
        try:
            return httpx.get(url, timeout=30, trust_env=False).text
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError(f"nobody listens at {url}")


def test_an_answer_of_the_servers_own_schema_is_read_whole():
    answer = LabelResponse(
        id="label-1",
        model="llavac",
        label_structure="llavac",
        labels=LABELS,
        probabilities={},
        confidence=0.9,
        retention={"ratio": 0.4, "selector": "cls", "kept": 26, "patches": 64},
        usage={
            "prompt_tokens": 70,
            "completion_tokens": 5,
            "total_tokens": 75,
            "prompt_tokens_details": {},
        },
        timing_ms={},
    )
    text = answer.model_dump_json(exclude_none=True)
    row = read(Call(first_at=0.1, done_at=0.2, status=200, text=text))
    assert (row["adapter"], row["structure"], row["selector"]) == ("llavac", "llavac", "cls")
    assert (row["ratio"], row["kept"]) == (0.4, 26)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (70, 5)
    assert json.loads(row["label"]) == LABELS
