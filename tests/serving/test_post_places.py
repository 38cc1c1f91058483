"""Posts behind URLs are those of the same files on this machine."""

from __future__ import annotations

import pickle
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from serving.errors import ConfigError
from serving.posts import Post, UrlPath, check_post, find_layout, find_place, read_posts
from tests.serving.test_posts import ALL_WAYS, as_jsonl, as_pairs


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder in fsspec's memory, for which no file of this machine is read."""
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    system, path = fsspec.url_to_fs(root)
    if system.exists(path):
        system.rm(path, recursive=True)


def uploaded(source: Path, folder: Path, bucket: str) -> str:
    system, _ = fsspec.url_to_fs(bucket)
    system.put(f"{folder}/", f"{bucket}/data", recursive=True)
    way = source.relative_to(folder).as_posix()
    return f"{bucket}/data" if way == "." else f"{bucket}/data/{way}"


def shown(posts: Any) -> list[tuple[Any, ...]]:
    return [(p.id, p.text, p.labels, p.asks, p.image_bytes()) for p in posts]


@pytest.mark.parametrize("way", ALL_WAYS)
def test_every_layout_is_read_from_a_url(
    way: Callable[[Path], Path], bucket: str, tmp_path: Path
) -> None:
    source = way(tmp_path / "data")
    url = uploaded(source, tmp_path / "data", bucket)
    expected = shown(read_posts(source))
    assert find_layout(UrlPath(url)) is find_layout(source)
    posts = read_posts(url)
    assert shown(posts) == expected == shown(posts)
    folder = UrlPath(url) if source.is_dir() else UrlPath(url).parent
    with fsspec.open(f"{folder}/some_ids.txt", "w") as file:
        file.write(expected[1][0])
    for split in ("some", f"{folder}/some_ids.txt"):
        assert shown(read_posts(url, split=split)) == expected[1:2]


def test_what_a_post_from_a_url_holds_can_be_sent_to_another_process(
    bucket: str, tmp_path: Path
) -> None:
    posts = list(read_posts(uploaded(as_jsonl(tmp_path), tmp_path, bucket)))
    assert pickle.loads(pickle.dumps(posts)) == posts
    assert shown(pickle.loads(pickle.dumps(posts))) == shown(posts)
    images = [image for post in posts for image in post.images]
    assert all(isinstance(image, UrlPath) for image in images)
    names = [image.name for image in images if isinstance(image, UrlPath)]
    assert names == ["1.jpg", "2.jpg", "10.jpg"]
    assert len({*posts[0].images, *posts[0].images}) == 1


def test_an_image_that_is_not_there_is_its_posts_fault(bucket: str, tmp_path: Path) -> None:
    source = as_jsonl(tmp_path)
    (tmp_path / "2.jpg").unlink()
    _, post, _ = read_posts(uploaded(source, tmp_path, bucket))
    (fault,) = check_post(post).faults
    assert (fault.kind, fault.detail) == ("missing_image", "2.jpg")


def test_a_file_url_is_a_path_of_this_machine(tmp_path: Path) -> None:
    source = as_jsonl(tmp_path)
    assert find_place(source.as_uri()) == source == find_place(str(source))
    assert list(read_posts(source.as_uri())) == list(read_posts(str(source)))
    assert list(read_posts(str(source))) == list(read_posts(source))


def test_posts_in_an_archive_are_read_by_a_chained_url(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "posts.zip", "w") as archive:
        for path in (tmp_path / "in").iterdir():
            archive.write(path, f"deep/{path.name}")
    expected = shown(read_posts(tmp_path / "in" / "posts.jsonl"))
    archive_url = (tmp_path / "posts.zip").as_uri()
    assert shown(read_posts(f"zip://deep/posts.jsonl::{archive_url}")) == expected
    as_pairs(tmp_path / "pairs")
    assert shown(read_posts(f"zip://deep::{archive_url}")) == shown(read_posts(tmp_path / "pairs"))


@pytest.mark.parametrize(
    ("url", "name", "suffix", "parent", "joined"),
    [
        ("s3://b/x/p.jsonl", "p.jsonl", ".jsonl", "s3://b/x", "s3://b/x/p.jsonl/i/a.jpg"),
        ("s3://b/x/", "x", "", "s3://b", "s3://b/x/i/a.jpg"),
        ("https://h/p.csv?key=1/2", "p.csv", ".csv", "https://h", "https://h/p.csv/i/a.jpg"),
        ("zip://d/p.csv::s3://b/a.zip", "p.csv", ".csv", "zip://d::s3://b/a.zip", None),
        ("simplecache::s3://b/p.csv", "p.csv", ".csv", "simplecache::s3://b", None),
    ],
)
def test_a_url_has_the_parts_of_a_path(
    url: str, name: str, suffix: str, parent: str, joined: str | None
) -> None:
    place = UrlPath(url)
    assert (place.name, place.suffix, place.parent) == (name, suffix, UrlPath(parent))
    if joined is not None:
        assert place / "i/./a.jpg" == UrlPath(joined)
        assert place.parent / "../up.jpg" == place.parent.parent / "up.jpg"


def test_an_image_path_that_leaves_the_urls_host_is_refused(bucket: str) -> None:
    with fsspec.open(f"{bucket}/p.jsonl", "w") as file:
        file.write('{"image": "/etc/a.jpg"}\n{"image": "b/a.jpg"}\n')
    wrong, post = read_posts(f"{bucket}/p.jsonl").entries()
    assert not isinstance(wrong, Post)
    assert "line 1: image='/etc/a.jpg'; allowed are a path relative to p.jsonl" in wrong.message
    assert isinstance(post, Post)
    assert post.images == (UrlPath(f"{bucket}/b/a.jpg"),)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://a/p.jsonl", "nothing:// URLs cannot be opened here: .*allowed are protocols"),
        ("memory://none/p.jsonl", "'memory://none/p.jsonl' does not exist"),
    ],
)
def test_a_url_that_cannot_be_opened_is_named(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_posts(url)


def test_a_protocol_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"class": "no_such_package.FileSystem", "err": "install no_such_package"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(ConfigError, match="absent:// URLs .*: install no_such_package; allowed"):
        read_posts("absent://bucket/p.jsonl")


class Refused(Exception):
    """What a protocol's package raises, which is no OSError."""


class Failing(MemoryFileSystem):
    """Memory whose files stop being readable after 20,000 bytes, or cannot be asked about."""

    protocol = "failing"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if "secret" in path:
            raise Refused("no login")
        return super().info(path, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        if mode == "rb" and path.endswith(".jsonl"):
            whole = file.read

            def read(size: int = -1) -> bytes:
                if file.tell() > 20_000:
                    raise Refused("connection lost")
                return whole(min(size, 10_000))

            file.read = read
        return file


def test_a_connection_that_is_lost_ends_the_reading_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    monkeypatch.setitem(_registry, "failing", Failing)
    with fsspec.open(f"{bucket}/p.jsonl", "w") as file:
        file.write("".join(f'{{"text": "text {n}"}}\n' for n in range(5000)))
    posts = iter(read_posts(f"{bucket}/p.jsonl".replace("memory", "failing")))
    assert next(posts).text == "text 0"
    with pytest.raises(ConfigError, match=r"p\.jsonl cannot be read any further: Refused: connec"):
        list(posts)
    with pytest.raises(ConfigError, match="secret.* cannot be read: Refused: no login"):
        read_posts("failing://secret/p.jsonl")
