"""Parquet: columns of every kind that writers make are posts, whatever is in their cells."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import ConfigError
from serving.posts import DataUrl, Post, Unreadable, read_posts

URL = "data:image/png;base64," + base64.b64encode(b"inline").decode()
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "p.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_rows_are_posts_with_their_labels(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([7, None], pa.int64()),
        "text": ["  hi ", None],
        "image": [None, "a.jpg"],
        "labels.sentiment": pa.array(["neutral", None]).dictionary_encode(),
    }
    posts = read_posts(write(tmp_path, columns))
    assert posts.num_posts == 2
    assert list(posts) == [
        Post(id="7", text="hi", labels={"sentiment": "neutral"}),
        Post(id="2", images=(tmp_path / "a.jpg",)),
    ]


@pytest.mark.parametrize(
    ("cells", "kind", "images"),
    [
        ([b"raw"], pa.binary(), [b"raw"]),
        ([b"raw"], pa.large_binary(), [b"raw"]),
        ([b"raw"], pa.binary_view(), [b"raw"]),
        (["a.jpg"], pa.large_string(), ["a.jpg"]),
        (["a.jpg"], pa.string_view(), ["a.jpg"]),
        ([URL], pa.string(), [DataUrl(URL)]),
        ([{"bytes": b"raw", "path": "x.jpg"}], STRUCT, [b"raw"]),
        ([{"bytes": None, "path": "a.jpg"}], STRUCT, ["a.jpg"]),
        ([{"bytes": None, "path": None}], STRUCT, []),
        ([None], pa.null(), []),
        ([None], STRUCT, []),
    ],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_images_of_every_kind_are_read(
    cells: list[Any], kind: pa.DataType, images: list[Any], is_list: bool, tmp_path: Path
) -> None:
    if is_list and (None in cells or not images):
        cells, kind, images = [[]], pa.list_(kind), []
    elif is_list:
        cells, kind, images = [cells * 2], pa.list_(kind), images * 2
    name = "images" if is_list else "image"
    (post,) = read_posts(write(tmp_path, {"text": ["a"], name: pa.array(cells, kind)}))
    expected = [tmp_path / image if isinstance(image, str) else image for image in images]
    assert post == Post(id="1", text="a", images=tuple(expected))


def test_names_of_the_users_own_are_mapped_and_other_columns_left_alone(tmp_path: Path) -> None:
    columns = {"tweet": ["a"], "pic": [b"raw"], "y": ["neutral"], "n": [1.5]}
    path = write(tmp_path, columns)
    fields = {"text": "tweet", "image": "pic", "labels.sentiment": "y"}
    (post,) = read_posts(path, fields=fields)
    assert post == Post(id="1", text="a", images=(b"raw",), labels={"sentiment": "neutral"})
    with pytest.raises(ConfigError, match="p.parquet schema: columns .*allowed are id, text"):
        read_posts(path)
    with pytest.raises(ConfigError, match="schema: no column 'twet', which fields names"):
        read_posts(path, fields={"text": "twet"})


@pytest.mark.parametrize(
    ("name", "cells", "says"),
    [
        ("id", [1.5], "column 'id' is double; id takes strings or integers"),
        ("text", [1], "column 'text' is int64; text takes strings"),
        ("text", [b"a"], "column 'text' is binary"),
        ("labels.x", [1], "column 'labels.x' is int64; labels.x takes strings"),
        ("image", [1], "image takes strings, bytes or structs"),
        ("image", [{"url": "a"}], "image takes"),
        ("images", ["a"], "images takes lists of strings"),
    ],
)
def test_a_column_of_a_wrong_type_is_refused_at_the_start(
    name: str, cells: list[Any], says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"text": ["a"], "image": ["a"], name: cells})
    with pytest.raises(ConfigError, match=says):
        read_posts(path)


def test_a_row_that_is_no_post_is_unreadable_and_reading_goes_on(tmp_path: Path) -> None:
    columns = {
        "id": ["a", "b", "c", None],
        "text": ["1", "2", "3", "4"],
        "image": pa.array([None, "x.jpg", "https://e.org/a.jpg", None]),
        "images": pa.array([["a", None], ["y.jpg"], None, None], pa.list_(pa.string())),
    }
    posts = read_posts(write(tmp_path, columns))
    *wrong, last = posts.entries()
    assert last == Post(id="4", text="4")
    says = ["row 1: images has a missing one", "row 2: image and images", "row 3: image='https"]
    for entry, id_, part in zip(wrong, ["row 1", "b", "c"], says, strict=True):
        assert isinstance(entry, Unreadable)
        assert part in entry.message
        assert entry.id in (id_, "a")
    with pytest.raises(ConfigError, match=r"p\.parquet row 1"):
        list(posts)


def test_texts_that_are_not_utf8_are_read_and_counted(tmp_path: Path) -> None:
    raw = pa.array([b"plain", "na\xefve".encode("cp1252"), None])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    posts = read_posts(write(tmp_path, {"text": text}))
    assert [post.text for post in posts] == ["plain", "naïve", ""]
    assert posts.num_not_utf8 == 1


def test_duplicates_over_row_groups_are_found(tmp_path: Path) -> None:
    ids = [f"{n % 900}" for n in range(1000)]
    path = write(tmp_path, {"id": ids, "text": ids}, row_group_size=100)
    with pytest.raises(ConfigError, match="row 901: id='0' is there twice"):
        list(read_posts(path))
    posts = read_posts(path, duplicates="first")
    assert (len(list(posts)), posts.num_duplicates) == (900, 100)


@pytest.mark.parametrize("size", [0, 100, -10])
def test_a_file_that_is_broken_is_said_to_be(size: int, tmp_path: Path) -> None:
    path = write(tmp_path, {"text": ["a"] * 100})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"p\.parquet cannot be read: "):
        read_posts(path)


def test_a_page_that_is_broken_ends_the_reading_with_the_files_name(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": [f"{n}" for n in range(2000)]}, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[40:80] = b"\xff" * 40
    path.write_bytes(raw)
    posts = read_posts(path)
    with pytest.raises(ConfigError, match=r"p\.parquet cannot be read: "):
        list(posts.entries())


# In a process of its own: what it takes above the memory after the first posts.
MEASURE = """
import itertools, os, sys
from pathlib import Path
from serving.posts import read_posts

def mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

posts = iter(read_posts(Path(sys.argv[1])))
for post in itertools.islice(posts, 20):
    pass
before = mib()
print(max(mib() - before for post in posts))
"""


def test_rows_with_large_images_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    images = [bytes([n]) * (1 << 20) for n in range(200)]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    path = write(tmp_path, {"image": images}, **options)
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 24
