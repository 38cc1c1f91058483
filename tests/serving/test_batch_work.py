"""Reading, journals and rows at volume, without an engine: memory is bounded, order is kept."""

import asyncio
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from serving.batch.counts import Counts
from serving.batch.prepare import Prepared
from serving.batch.shards import RunFolder
from serving.batch.work import Work
from serving.errors import ConfigError
from serving.posts import read_posts
from tests.serving.batch_stub import ROOT, TABLE, constant_answer


class NoImages:
    """Prepares posts that have no images."""

    num_workers = 1

    async def prepare(self, posts):
        return [Prepared(images=(), key=b"") for _ in posts]


async def say_good(post, prepared):
    return (constant_answer(),), False


def write_posts(path, number):
    with path.open("w") as file:
        for index in range(number):
            row = {"id": f"post {index}", "text": f"a great day in the park, number {index}"}
            file.write(json.dumps(row) + "\n")


def label(data, out, *, format="jsonl", shard_size=1000):
    """Posts that were labelled now."""
    progress = Counts()
    folder = RunFolder(out)
    with folder.held():
        work = Work(folder, TABLE, format=format, shard_size=shard_size)
        entries = read_posts(data).entries()
        run = work.run(entries, NoImages(), say_good, concurrency=64, on_done=progress.add)
        asyncio.run(run)
    return progress["posts"]


def ids_of(out, format):
    for path in sorted(out.glob("labels-*")):
        if format == "parquet":
            yield from pq.read_table(path, columns=["id"])["id"].to_pylist()
        else:
            with path.open(newline="") as file:
                rows = csv.DictReader(file) if format == "csv" else map(json.loads, file)
                yield from (row["id"] for row in rows)


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_rows_stand_in_the_order_of_the_input_and_a_second_run_does_nothing(tmp_path, format):
    data, out = tmp_path / "posts.jsonl", tmp_path / "out"
    write_posts(data, 250)
    assert label(data, out, format=format, shard_size=100) == 250
    assert list(ids_of(out, format)) == [f"post {index}" for index in range(250)]
    assert label(data, out, format=format, shard_size=100) == 0
    assert RunFolder(out).counts()["posts"] == 250


@pytest.mark.parametrize("change", ["swapped", "shorter", "other"])
def test_data_that_changed_under_a_run_is_told_before_anything_is_published(tmp_path, change):
    data, out = tmp_path / "posts.jsonl", tmp_path / "out"
    write_posts(data, 250)
    label(data, out, shard_size=100)
    before = {path: path.read_bytes() for path in out.glob("labels-*")}
    lines = data.read_text().splitlines()
    if change == "swapped":
        lines[3], lines[4] = lines[4], lines[3]
    elif change == "shorter":
        lines = lines[:240]
    else:
        lines[3] = lines[3].replace("post 3", "post x")
    data.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="the data changed"):
        label(data, out, shard_size=100)
    assert {path: path.read_bytes() for path in out.glob("labels-*")} == before


def resident_mib(pid):
    """Resident memory now, and its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return [int(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "number"), [("jsonl", 1_000_000), ("csv", 100_000), ("parquet", 100_000)]
)
def test_a_million_posts_pass_in_bounded_memory(tmp_path, format, number):
    """Growth from a tenth of the way to the end; a million rows are 400 MB on disk."""
    data, out = tmp_path / "posts.jsonl", tmp_path / "out"
    write_posts(data, number)
    code = (
        "import sys, pathlib\n"
        "from tests.serving.test_batch_work import label\n"
        "data, out = map(pathlib.Path, sys.argv[1:3])\n"
        "print(label(data, out, format=sys.argv[3]), flush=True)\n"
        "sys.stdin.read()"
    )
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(data), str(out), format],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while len(list((out / ".batch").glob("[0-9]*.json"))) < number // 10_000:
            assert process.poll() is None
            time.sleep(0.05)
        early, _ = resident_mib(process.pid)
        assert process.stdout.readline() == f"{number}\n"
        wall_s = time.monotonic() - began
        _, peak = resident_mib(process.pid)
    print(
        f"{format}: {number / wall_s:.0f} rows/s, {early:.0f} MiB at a tenth, peak {peak:.0f} MiB"
    )
    assert peak - early < 64
    for index, id_ in enumerate(ids_of(out, format)):
        assert id_ == f"post {index}"
    assert index == number - 1
