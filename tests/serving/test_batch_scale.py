"""Shards that several processes work on: how they are read, counted, and waited for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.batch.options import BatchOptions
from serving.batch.outcomes import Outcome
from serving.batch.shard_worker import ShardReader
from serving.batch.shards import IdsDigest, Journal, RunFolder
from serving.errors import ConfigError
from serving.posts import read_posts

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "out")


@pytest.fixture
def posts(tmp_path):
    """Eighteen posts: four shards of four and one of two."""
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": "x"}) + "\n" for n in range(18)))
    return read_posts(path)


class Counted:
    """A source that counts its readings."""

    def __init__(self, posts):
        self._posts, self.num_readings = posts, 0

    def entries(self):
        self.num_readings += 1
        return self._posts.entries()


def commit(folder, index, ids, failed=0):
    digest = IdsDigest()
    for id_ in ids:
        digest.add(id_)
    commit = {"posts": len(ids), "failed": failed, "ids": digest.hexdigest(), "counts": []}
    folder.publish(index, {"labels.jsonl": Path.touch}, commit)


def ids_of(entries):
    return [entry.id for entry in entries]


def test_shards_in_rising_order_are_one_reading(posts, folder):
    source = Counted(posts)
    reader = ShardReader(source, folder, SIZE)
    assert ids_of(reader.shard(0)) == ["0", "1", "2", "3"]
    assert ids_of(reader.shard(3)) == ["12", "13", "14", "15"]
    assert ids_of(reader.shard(4)) == ["16", "17"]
    assert source.num_readings == 1


def test_a_shard_that_comes_back_is_read_anew(posts, folder):
    source = Counted(posts)
    reader = ShardReader(source, folder, SIZE)
    reader.shard(2)
    assert ids_of(reader.shard(1)) == ["4", "5", "6", "7"]
    assert ids_of(reader.shard(1)) == ["4", "5", "6", "7"]
    assert source.num_readings == 3


def test_data_that_changed_before_a_shard_is_told(posts, folder):
    commit(folder, 0, ["0", "1", "2", "3"])
    commit(folder, 1, ["4", "5", "new", "7"])
    reader = ShardReader(posts, folder, SIZE)
    reader.shard(1)
    with pytest.raises(ConfigError, match=r"posts 5 to 8 of the data .* changed"):
        ShardReader(posts, folder, SIZE).shard(2)


def test_only_what_has_no_outcome_is_left(folder):
    scale = pytest.importorskip("serving.batch.scale", exc_type=ConfigError)
    commit(folder, 0, ["0", "1", "2", "3"])
    commit(folder, 1, ["4", "5", "6", "7"], failed=1)
    for index, error in ((8, None), (9, {"stage": "label"})):
        journal = Journal(folder.journal(2))
        journal.add(Outcome(index=index, id=str(index), error=error))
        journal.close()

    def left(**more):
        options = BatchOptions(data="x", out=folder.path, shard_size=SIZE, **more)
        return scale.shards_left(SimpleNamespace(options=options), folder, 18)

    assert left() == {2: 2, 3: 4, 4: 2}
    assert left(retry_failed=True) == {1: 4, 2: 3, 3: 4, 4: 2}


def test_a_shard_that_was_decided_by_a_killed_process_is_finished_by_who_takes_it(folder):
    killed = RunFolder(folder.path)
    killed.finish = lambda index: None  # the kill
    commit(killed, 3, ["12", "13", "14", "15"])
    commit(killed, 4, ["16", "17"])
    assert list(folder.commits([3])) == [3]
    assert (folder.path / "labels-00003.jsonl").exists()
    assert not (folder.path / "labels-00004.jsonl").exists()  # somebody else's


HELPER = """
import sys, time
from pathlib import Path
from serving.batch.shards import RunFolder
with RunFolder(Path(sys.argv[1])).helped():
    print("helping", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def helper(folder, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER, str(folder.path), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "helping\n"
    return process


def test_a_later_run_waits_until_the_engines_of_a_killed_one_have_ended(folder):
    with helper(folder, 1.0) as process:
        started = time.monotonic()
        with folder.held():
            assert time.monotonic() - started > 0.5
        assert process.wait(10) == 0


def test_engines_that_do_not_end_are_told_and_a_killed_one_lets_go(folder):
    with helper(folder, 60) as process:
        with pytest.raises(ConfigError, match="engines of a run before"):
            folder.wait_for_helpers(0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        folder.wait_for_helpers(0.3)


def test_helpers_do_not_wait_for_each_other(folder):
    with helper(folder, 30) as one, helper(folder, 30) as other:
        one.kill()
        other.kill()
