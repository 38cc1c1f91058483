"""A folder of images and texts that are paired by their names."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from serving.errors import ConfigError
from serving.posts.ids import LIST_SUFFIX
from serving.posts.places import Place, UrlPath
from serving.posts.post import IMAGE_SUFFIXES, Post
from serving.posts.reader import Found, Posts, Reading, RowError


class FolderPosts(Posts):
    """Images and texts of one folder, paired by their names without suffix, in natural order.

    Two images (or texts) of one name are a post twice, the later one with the same text (image).
    """

    description = f"a folder of pairs, images ({', '.join(IMAGE_SUFFIXES)}) and .txt of one name"

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        self._files = _Files(_names(source))
        if reading.duplicates == "error":
            self._check_unique()
        if reading.chosen is None:
            self.num_posts = self._files.num_posts(are_all=reading.duplicates == "rename")

    def _check_unique(self) -> None:
        for kind, names in self._files.twice():
            raise ConfigError(
                f"id={_stem(names[0])!r} is there twice: {names[0]!r} and {names[1]!r}; "
                f"a post has one {kind} here, use JSONL for several"
            )

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return source.is_dir() and any(map(_kind, _names(source)))

    def _found(self) -> Iterator[Found]:
        for kinds in self._files.by_stem():
            images, texts = kinds.get("image", []), kinds.get("text", [])
            for place in range(max(len(images), len(texts))):
                image, text = _at(images, place), _at(texts, place)
                names = [name for name in (image, text) if name is not None]
                yield self._pair(_stem(names[0]), image, text)

    def _pair(self, id_: str, image: str | None, text: str | None) -> Found:
        where = text or f"{image}"
        try:
            return where, Post(
                id=id_,
                text="" if text is None else self._read_text(self.source / text),
                images=() if image is None else (self.source / image,),
            )
        except RowError as error:
            return where, self._unreadable(where, error, id_)


class _Files:
    """Names of files in a temporary table, which goes to disk as it grows; see `IdSet`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = OFF", "synchronous = OFF"):
            self._table.execute(f"PRAGMA {pragma}")
        self._table.execute("CREATE TABLE files (place BLOB, stem BLOB, kind TEXT, name BLOB)")
        self._table.execute("BEGIN")
        self._table.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?)",
            (
                (_natural(_stem(name)), os.fsencode(_stem(name)), kind, os.fsencode(name))
                for name in names
                if (kind := _kind(name)) is not None
            ),
        )

    def by_stem(self) -> Iterator[dict[str, list[str]]]:
        """Names by kind of all that have one stem."""
        rows = self._table.execute("SELECT stem, kind, name FROM files ORDER BY place, stem, name")
        for _, files in groupby(rows, itemgetter(0)):
            kinds: dict[str, list[str]] = {}
            for _, kind, name in files:
                kinds.setdefault(kind, []).append(os.fsdecode(name))
            yield kinds

    def twice(self) -> Iterator[tuple[str, list[str]]]:
        """Kind and names of the files of one kind and stem, where there are several."""
        several = "SELECT stem, kind FROM files GROUP BY stem, kind HAVING COUNT(*) > 1 LIMIT 1"
        for stem, kind in self._table.execute(several):
            names = "SELECT name FROM files WHERE stem = ? AND kind = ? ORDER BY name"
            found = self._table.execute(names, (stem, kind))
            yield kind, [os.fsdecode(name) for (name,) in found]

    def num_posts(self, *, are_all: bool) -> int:
        """How many stems there are, or how many posts with those of a stem that is there twice."""
        each = "SELECT stem, COUNT(*) AS num FROM files GROUP BY stem, kind"
        amount = "MAX(num)" if are_all else "1"
        stems = f"SELECT {amount} AS num FROM ({each}) GROUP BY stem"
        return int(self._table.execute(f"SELECT TOTAL(num) FROM ({stems})").fetchone()[0])


def _names(folder: Place) -> Iterator[str]:
    """Names of what is in a folder; of this machine's not all at once."""
    if isinstance(folder, UrlPath):
        yield from (path.name for path in folder.iterdir())
    else:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _at(names: list[str], place: int) -> str | None:
    """The name at that place, or the last."""
    return names[min(place, len(names) - 1)] if names else None


def _kind(name: str) -> str | None:
    """What a file is to a post; lists of ids are nothing to it."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith(".") or name.endswith(LIST_SUFFIX):
        return None
    if suffix not in (*IMAGE_SUFFIXES, ".txt"):
        return None
    return "text" if suffix == ".txt" else "image"


def _natural(name: str) -> bytes:
    """Sorts 2 before 10: text and numbers alternate, so that like compares with like.

    Bytes that compare as the list of these parts would: a text ends in a zero byte, which no name
    has, and a number starts with how many digits it has.
    """
    parts = []
    for index, part in enumerate(re.split(r"(\d+)", name)):
        if index % 2:
            digits = str(int(part)).encode()
            parts.append(len(digits).to_bytes(2, "big") + digits)
        else:
            parts.append(os.fsencode(part) + b"\0")
    return b"".join(parts)
