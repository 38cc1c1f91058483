"""Ids: exact sets outside of memory, so that a million posts are read in what a few take."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import ConfigError
from serving.posts import IdList, IdSet, read_posts

MILLION = 1_000_000


def test_a_set_of_ids_is_a_set() -> None:
    ids, twin = IdSet(), set()
    for number in range(3000):
        for id_ in (f"a{number * 7919 % 1000}", f"é{number % 11}", "\udcff", "1", "01", "1.0", ""):
            assert ids.add(id_) == (id_ not in twin)
            twin.add(id_)
    assert len(ids) == len(twin)
    assert all(id_ in ids for id_ in twin)
    assert "absent" not in ids


def test_a_list_names_the_first_id_that_is_not_known_and_counts_all(tmp_path: Path) -> None:
    path = tmp_path / "some_ids.txt"
    path.write_text("a\nb\nc\nd\n")
    ids = IdList(path)
    ids.check_all_in("dcba", "there")
    with pytest.raises(ConfigError, match=r"line 2: id=.b. is not in there; 3 of the 4"):
        ids.check_all_in("a", "there")


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            row = {"id": f"post-{number}", "text": f"text {number}", "image": "a.jpg"}
            file.write(json.dumps({**row, "labels": {"sentiment": "neutral"}}) + "\n")


def write_csv(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text", "image", "labels.sentiment"])
        for number in range(count):
            rows.writerow([f"post-{number}", f"text {number}", "a.jpg", "neutral"])


def write_json(path: Path, count: int) -> None:
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "neutral"}]
    with path.open("w") as file:
        for number in range(count):
            row = {"id": f"post-{number}", "image": "a.jpg", "conversations": turns}
            file.write(("," if number else "[") + json.dumps(row))
        file.write("]")


def write_lines(path: Path, count: int) -> None:
    line = {"method": "POST", "url": "/v1/label"}
    with path.open("w") as file:
        for number in range(count):
            body = {"text": f"text {number}", "image": "data:image/png;base64,aGk="}
            file.write(json.dumps({"custom_id": f"post-{number}", **line, "body": body}) + "\n")


def write_parquet(path: Path, count: int) -> None:
    columns = {
        "id": [f"post-{number}" for number in range(count)],
        "text": [f"text {number}" for number in range(count)],
        "image": ["a.jpg"] * count,
        "labels.sentiment": ["neutral"] * count,
    }
    pq.write_table(pa.table(columns), path)


def write_shuffled(path: Path, count: int) -> None:
    """Ids in no order, as of UUIDs, which are the worst for a sorted table."""
    digests = (hashlib.md5(f"{number}".encode()).hexdigest() for number in range(count))
    with path.open("w") as file:
        for digest in digests:
            file.write(f'{{"id": "{digest}", "image": "a.jpg", "text": "text"}}\n')


# In a process of its own: what it takes above the memory after the first ten thousand posts.
MEASURE = """
import itertools, os, sys, time
from pathlib import Path
from serving.posts import read_posts

def mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

posts = read_posts(Path(sys.argv[1]), split=sys.argv[2] or None)
for post in itertools.islice(read_posts(Path(sys.argv[1])).entries(), 10_000):
    pass
before = peak = mib()
start, count = time.process_time(), 0
for post in posts.entries():
    count += 1
    if count % 10_000 == 0:
        peak = max(peak, mib())
print(count, max(peak, mib()) - before, time.process_time() - start)
"""


def read_apart(source: Path, split: str = "") -> tuple[int, float, float]:
    """Posts read, MiB on top, seconds of CPU."""
    command = [sys.executable, "-c", MEASURE, str(source), split]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, grown, seconds = done.stdout.split()
    return int(count), float(grown), float(seconds)


WRITERS = {
    "posts.jsonl": write_jsonl,
    "shuffled.jsonl": write_shuffled,
    "requests.jsonl": write_lines,
    "posts.csv": write_csv,
    "posts.parquet": write_parquet,
    "posts.json": write_json,
}


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_million_posts_are_read_in_flat_memory(name: str, tmp_path: Path) -> None:
    write: Callable[[Path, int], None] = WRITERS[name]
    write(tmp_path / name, MILLION)
    count, grown, seconds = read_apart(tmp_path / name)
    print(f"{name}: {count / seconds:.0f} posts per CPU second, {grown:.1f} MiB on top of 10,000")
    assert count == MILLION
    assert grown < 16


def test_a_folder_is_read_in_flat_memory(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"picture")
    for number in range(30_000):
        os.link(tmp_path / "0.jpg", tmp_path / f"post-{number}.jpg")
    count, grown, seconds = read_apart(tmp_path)
    print(f"folder: {count / seconds:.0f} posts per CPU second, {grown:.1f} MiB on top of 10,000")
    assert count == 30_001
    assert grown < 8


@pytest.mark.long
def test_half_a_million_of_a_million_are_chosen_in_flat_memory(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "posts.jsonl", MILLION)
    ids = "\n".join(f"post-{number}" for number in range(0, MILLION, 2))
    (tmp_path / "half_ids.txt").write_text(ids)
    count, grown, seconds = read_apart(tmp_path / "posts.jsonl", "half")
    print(f"{count} of {MILLION} posts in {seconds:.1f} CPU s, {grown:.1f} MiB on top of 10,000")
    assert count == MILLION // 2
    assert grown < 16


def test_a_duplicate_far_behind_is_found(tmp_path: Path) -> None:
    path = tmp_path / "posts.jsonl"
    write_jsonl(path, 20_000)
    with path.open("a") as file:
        file.write('{"id": "post-3", "text": "again"}\n')
    with pytest.raises(ConfigError, match="line 20001: id='post-3' is there twice"):
        for _ in read_posts(path):
            pass
