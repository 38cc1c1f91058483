"""A batch that is killed anywhere and run again: every id in exactly one row, in its place."""

import json
import random
import shutil
from itertools import count

import pytest

from tests.pictures import encoded, noise
from tests.serving.batch_stub import Zygote, run_here, write_posts


@pytest.fixture(scope="module")
def zygote():
    with Zygote.running() as zygote:
        yield zygote


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def whole_lines(path):
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def num_failed(expected):
    return sum(stage is not None for stage in expected.values())


def check_published(out, expected, shard_size):
    """Every id once, in its shard and in the input's order, with the stage that is expected."""
    ids, names = list(expected), {"summary.json", ".batch"}
    for index, start in enumerate(range(0, len(ids), shard_size)):
        part = ids[start : start + shard_size]
        labels = rows(out / f"labels-{index:05d}.jsonl")
        errors = rows(out / f"errors-{index:05d}.jsonl")
        assert [row["id"] for row in labels] == [i for i in part if expected[i] is None]
        assert [(row["id"], row["stage"]) for row in errors] == [
            (i, expected[i]) for i in part if expected[i] is not None
        ]
        names |= {f"{kind}-{index:05d}.jsonl" for kind in ("labels", *(["errors"] * bool(errors)))}
        assert (out / f".batch/{index:05d}.journal").exists() == bool(errors)
    assert {path.name for path in out.iterdir()} == names
    assert not [path for path in (out / ".batch").iterdir() if path.is_dir()]
    summary = json.loads((out / "summary.json").read_text())
    labels = summary["distribution"]["sentiment"]["sentiment"]
    assert (summary["posts"], summary["failed"]) == (len(ids), num_failed(expected))
    assert summary["labelled"] == len(ids) - summary["failed"] == sum(labels.values())


def answered(out):
    """Ids that have labels, published or in a journal."""
    found = {row["id"] for path in out.glob("labels-*.jsonl") for row in rows(path)}
    for path in (out / ".batch").glob("*.journal"):
        found |= {row["id"] for row in whole_lines(path) if row["error"] is None}
    return found


def mend(folder, expected):
    """Makes an image whole that was torn; what is expected then."""
    (folder / "torn.png").write_bytes(encoded(noise(5)))
    return {i: None if stage == "decode" else stage for i, stage in expected.items()}


@pytest.mark.parametrize("retries", [False, True])
def test_killed_before_any_change_of_a_file_the_same_command_ends_well(tmp_path, zygote, retries):
    data, calls, begun = tmp_path / "posts.jsonl", tmp_path / "calls", tmp_path / "begun"
    expected = write_posts(tmp_path, 9, seed=5)
    assert {None, "decode"} < set(expected.values())  # the case below is one
    flags = ["--shard-size", "3"]
    if retries:
        assert zygote.run(data, begun, calls, flags=flags) == 3
        expected = mend(tmp_path, expected)
        flags.append("--retry-failed")
    for number in count(1):
        out = tmp_path / f"out{number}"
        if retries:
            shutil.copytree(begun, out)
        status = zygote.run(data, out, calls, flags=flags, at_change=number)
        if status != -9:
            break
        assert run_here(data, out, calls, flags) == 3, number
        check_published(out, expected, 3)
        shutil.rmtree(out)
    assert status == 3
    assert number > 20  # so many kills, each at another moment


def test_killed_at_random_moments_a_run_labels_only_what_is_missing(tmp_path, zygote):
    rng = random.Random(6)
    expected = write_posts(tmp_path, 400, seed=2)
    texts = {row["id"]: row.get("text") for row in rows(tmp_path / "posts.jsonl")}
    out, calls = tmp_path / "out", tmp_path / "calls"
    how = {"data": tmp_path / "posts.jsonl", "out": out, "calls": calls, "delay_s": 0.1}
    flags = ["--shard-size", "40", "--concurrency", "8"]  # 4 s of work, at the least
    had, most_s = [0], 0.3
    for _ in range(15):
        assert zygote.run(**how, flags=flags, after_s=rng.uniform(0.02, most_s)) == -9
        had.append(len(answered(out)))
        most_s *= 1.0 if had[-1] > had[-2] else 1.3  # a slow machine did not get to the posts
    assert had == sorted(had)  # a kill takes nothing back
    assert 0 < had[-1] < 400 - num_failed(expected)  # nor was it done before the last one
    missing = {i for i, stage in expected.items() if stage is None} - answered(out)
    calls.unlink()
    assert zygote.run(**how, flags=flags) == 3
    check_published(out, expected, 40)
    asked_once = {texts[i] for i in missing if texts[i] == "the same"}
    assert calls.stat().st_size == sum(texts[i] != "the same" for i in missing) + len(asked_once)
