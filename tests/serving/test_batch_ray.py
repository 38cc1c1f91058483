"""`python -m serving batch --ray`: two engines, one killed, the driver killed, the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

from bench.process_tree import descendants, is_alive
from tests.pictures import encoded, noise

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
NUM_POSTS, SHARD = 200, 20
BROKEN = {7, 64, 65, 133}
MISSING = 150


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    """Two hundred posts, four of them with images that are none, one without its file."""
    folder = tmp_path_factory.mktemp("posts")
    rows = []
    for number in range(NUM_POSTS):
        raw = b"no image" if number in BROKEN else encoded(noise(number))
        if number != MISSING:
            (folder / f"{number}.png").write_bytes(raw)
        rows.append({"id": f"post-{number}", "image": f"{number}.png", "text": f"day {number}"})
    path = folder / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Run:
    """The command in a process of its own, with what it said."""

    def __init__(self, posts, out, log, *more):
        self.log = log
        command = [sys.executable, "-m", "serving", "batch", "--data", str(posts)]
        command += ["--out", str(out), "--model", "sentiment", "--retention", "0.4"]
        command += ["--shard-size", str(SHARD), "--ray", "--engines", "2", *more]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                start_new_session=True,
            )

    def wait_for(self, condition, most_s=300.0):
        deadline = time.monotonic() + most_s
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return found

    def actors(self):
        """Process ids of the actors that hold an engine."""
        return sorted({parent_of(core) for core in self.cores()})

    def cores(self):
        return [pid for pid in descendants(self.process.pid) if "EngineCore" in name_of(pid)]

    def end(self, most_s=420.0):
        return self.process.wait(most_s)


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def commits(out):
    return sorted((out / ".batch").glob("[0-9]*.json"))


def journalled(out):
    """Journals of shards in work, with posts in them."""
    return [path for path in (out / ".batch").glob("*.journal") if path.stat().st_size > 500]


def rows(out, kind):
    """Published rows by shard, in order."""
    return {
        int(path.name.split("-")[1].split(".")[0]): [json.loads(x) for x in path.open()]
        for path in sorted(out.glob(f"{kind}-*.jsonl"))
    }


def check_every_id_once(out):
    labels, errors = rows(out, "labels"), rows(out, "errors")
    assert sorted(labels) == list(range(NUM_POSTS // SHARD))
    failed = {row["id"] for shard in errors.values() for row in shard}
    assert failed == {f"post-{number}" for number in BROKEN | {MISSING}}
    for index, shard in labels.items():
        numbers = range(index * SHARD, (index + 1) * SHARD)
        wanted = [f"post-{number}" for number in numbers if f"post-{number}" not in failed]
        assert [row["id"] for row in shard] == wanted
    stages = {row["id"]: row["stage"] for shard in errors.values() for row in shard}
    assert stages.pop(f"post-{MISSING}") == "read"
    assert set(stages.values()) == {"decode"}


def test_a_killed_engine_and_a_killed_driver_lose_and_double_nothing(posts, tmp_path):
    out = tmp_path / "out"
    first = Run(posts, out, tmp_path / "first.log")
    try:
        first.wait_for(lambda: journalled(out))
        victim = first.wait_for(first.actors)[0]
        os.kill(victim, signal.SIGKILL)
        done = len(commits(out))
        first.wait_for(lambda: len(commits(out)) > done + 1)
        family = descendants(first.process.pid)
        assert victim not in family
    finally:
        first.process.kill()
    assert first.end() == -signal.SIGKILL
    before = {path.name: path.read_text() for path in out.glob("*.jsonl")}
    assert 0 < len(commits(out)) < NUM_POSTS // SHARD

    again = Run(posts, out, tmp_path / "again.log")
    try:
        again.wait_for(lambda: len(again.actors()) == 2)
        assert not [pid for pid in family if is_alive(pid)]  # the killed driver's are gone
        family = again.wait_for(lambda: commits(out)[len(before) :]) and descendants(
            again.process.pid
        )
        assert again.end() == 3, again.log.read_text()[-3000:]  # done, some failed
    finally:
        again.process.kill()
    check_every_id_once(out)
    assert {name: (out / name).read_text() for name in before} == before
    assert json.loads((out / "summary.json").read_text())["posts"] == NUM_POSTS
    deadline = time.monotonic() + 10
    while left := [pid for pid in family if is_alive(pid)]:
        assert time.monotonic() < deadline, [name_of(pid) for pid in left]
        time.sleep(0.2)


def test_sigterm_ends_ray_and_keeps_what_is_labelled(posts, tmp_path):
    out = tmp_path / "out"
    run = Run(posts, out, tmp_path / "log")
    try:
        run.wait_for(lambda: journalled(out))
        family = descendants(run.process.pid)
        run.process.send_signal(signal.SIGTERM)
        assert run.end(60) == 143, run.log.read_text()[-3000:]
    finally:
        run.process.kill()
    assert "run the same command again to go on" in run.log.read_text()
    deadline = time.monotonic() + 10
    while left := [pid for pid in family if is_alive(pid)]:
        assert time.monotonic() < deadline, [name_of(pid) for pid in left]
        time.sleep(0.2)
    assert journalled(out)


def test_an_engine_that_cannot_start_is_told_as_in_one_process(posts, tmp_path):
    run = Run(posts, tmp_path / "out", tmp_path / "log", "--max-model-len", "1000000")
    assert run.end() == 2
    said = run.log.read_text()
    assert "error: " in said
    assert "max_model_len" in said
