"""`python -m serving batch` with the real engine, as a user runs it."""

import base64
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.pictures import encoded, noise
from tests.serving.test_command_line import ROOT, descendants, is_running

NUM, BROKEN, SHARD = 60, (7, 20, 41), 25
WORDS = ("a great day in the park", "what a bad trip", "nothing new here")


def write_posts(folder):
    """Posts with three torn images, of which the second will be mended."""
    lines = []
    for index in range(NUM):
        name = f"{index}.png"
        raw = encoded(noise(index, (60 + index, 90)))
        (folder / name).write_bytes(raw[:300] if index in BROKEN else raw)
        post = {"id": f"p{index}", "text": f"{WORDS[index % 3]} {index}", "image": name}
        lines.append(json.dumps(post))
    (folder / "posts.jsonl").write_text("\n".join(lines))


def command(folder, *more):
    flags = f"--format csv --shard-size {SHARD} --concurrency 4 --dtype float32 --kv-cache-gib 1"
    return [
        *(sys.executable, "-m", "serving", "batch", "--data", str(folder / "posts.jsonl")),
        *("--out", str(folder / "out"), "--model", "llavac", "--model", "sentiment"),
        *(*flags.split(), *more),
    ]


def run(folder, *more):
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(
        command(folder, *more), cwd=ROOT, env=environment, capture_output=True, text=True
    )


def kill_in_the_middle(folder, after=15):
    """Starts it, kills it after some posts; returns the processes it had."""
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "first.log").open("w") as log:
        process = subprocess.Popen(
            command(folder), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    journal = folder / "out/.batch/00000.journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < after:
        assert process.poll() is None, (folder / "first.log").read_text()[-3000:]
        time.sleep(0.005)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return children


def rows(folder, kind):
    paths = sorted((folder / "out").glob(f"{kind}-*"))
    if kind == "errors":
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was killed, then ended with one image mended."""
    folder = tmp_path_factory.mktemp("batch")
    write_posts(folder)
    children = kill_in_the_middle(folder)
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):  # its engine and workers end by themselves
        assert time.monotonic() < deadline, [pid for pid in children if is_running(pid)]
        time.sleep(0.1)
    (folder / f"{BROKEN[1]}.png").write_bytes(encoded(noise(BROKEN[1])))
    done = run(folder, "--retry-failed")
    assert done.returncode == 3, done.stderr[-3000:]
    return folder, done


def test_every_post_has_one_row_in_its_place_after_a_kill(finished):
    folder, done = finished
    failed = [f"p{BROKEN[0]}", f"p{BROKEN[2]}"]
    assert [row["id"] for row in rows(folder, "labels")] == [
        f"p{index}" for index in range(NUM) if f"p{index}" not in failed
    ]
    errors = rows(folder, "errors")
    assert [row["id"] for row in errors] == failed
    assert all((row["stage"], row["retryable"]) == ("decode", False) for row in errors)
    assert f"{NUM - 2} of {NUM} posts labelled" in done.stdout
    summary = json.loads((folder / "out/summary.json").read_text())
    assert 0 < summary["this_run"]["posts"] <= NUM - 15 + 1  # what the first run had stays
    assert set(summary["distribution"]) == {"llavac", "sentiment"}


def test_rows_are_what_the_server_answers(finished, demo_server):
    folder, _ = finished
    by_id = {row["id"]: row for row in rows(folder, "labels")}
    for index in (0, 1, BROKEN[1], NUM - 1):
        image = base64.b64encode((folder / f"{index}.png").read_bytes()).decode()
        body = {"text": f"{WORDS[index % 3]} {index}", "image": f"data:image/png;base64,{image}"}
        for model in ("llavac", "sentiment"):
            theirs, row = demo_server.label(**body, model=model), by_id[f"p{index}"]
            assert row[f"{model}.kept"] == str(theirs["retention"]["kept"])
            for field, shares in theirs["probabilities"].items():
                assert row[f"{model}.{field}"] == theirs["labels"][field]
                for label, share in shares.items():
                    ours = float(row[f"{model}.{field}.{label}"])
                    assert ours == pytest.approx(share, abs=1e-3)


def test_a_finished_run_starts_no_engine_and_other_settings_are_refused(finished):
    folder, _ = finished
    began = time.monotonic()
    again = run(folder)
    assert again.returncode == 3
    assert "loading" not in again.stderr
    assert time.monotonic() - began < 60
    other = run(folder, "--retention", "0.4")
    assert other.returncode == 2
    assert "was begun with retention=None, now it is 0.4" in other.stderr
    assert "Traceback" not in other.stderr
