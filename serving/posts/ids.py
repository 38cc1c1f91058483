"""Ids of posts: sets of them that stay out of memory, and files that list some of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Container
from pathlib import Path
from typing import Literal

from serving.errors import ConfigError
from serving.posts.places import Place, UrlPath, find_place
from serving.posts.texts import numbered_lines

LIST_SUFFIX = "_ids.txt"
Duplicates = Literal["error", "first", "rename"]
"""Of posts with one id: refuse them, keep the first, or call the later ones `id#2`, `id#3`."""


class IdSet:
    """Ids in a temporary SQLite table, which goes to disk as it grows: a million take 3 MiB.

    A Python set of a million ids takes 110 MiB; one of short digests is no smaller, as every
    entry stays an object. The table is exact (no two ids can collide) and costs 4 µs an id, less
    than parsing its row.
    """

    def __init__(self) -> None:
        # An empty name is a private file that SQLite removes with the connection.
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = OFF", "synchronous = OFF"):
            self._table.execute(f"PRAGMA {pragma}")
        self._table.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._table.execute("CREATE TABLE met (id BLOB PRIMARY KEY, times INT) WITHOUT ROWID")
        self._table.execute("BEGIN")
        self._num = 0

    def add(self, id_: str) -> bool:
        """Adds an id; whether it was not there before.

        Raises:
            ConfigError: the disk of the temporary folder is full.
        """
        try:
            done = self._table.execute("INSERT OR IGNORE INTO ids VALUES (?)", (_raw(id_),))
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"ids cannot be kept in the temporary folder ({error}); free space there or set "
                "SQLITE_TMPDIR to another folder"
            ) from error
        self._num += done.rowcount
        return done.rowcount == 1

    def meet_again(self, id_: str) -> int:
        """Counts meetings with an id that was added, which was the first: 2, 3, ..."""
        again = self._table.execute(
            "INSERT INTO met VALUES (?, 2) ON CONFLICT DO UPDATE SET times = times + 1 "
            "RETURNING times",
            (_raw(id_),),
        )
        return int(again.fetchone()[0])

    def __contains__(self, id_: object) -> bool:
        if not isinstance(id_, str):
            return False
        found = self._table.execute("SELECT 1 FROM ids WHERE id = ?", (_raw(id_),))
        return found.fetchone() is not None

    def __len__(self) -> int:
        return self._num

    def close(self) -> None:
        """Removes the table."""
        self._table.close()


def _raw(id_: str) -> bytes:
    return id_.encode(errors="surrogatepass")  # names of files need not be Unicode


class IdsInUse:
    """Ids that are given out, each once.

    Attributes:
        seen: all that were given out.
        num_duplicates: how often an id was claimed that was given out before.
    """

    def __init__(self, duplicates: Duplicates) -> None:
        self.seen = IdSet()
        self.num_duplicates = 0
        self._duplicates = duplicates
        self._invented = IdSet()

    def claim(self, id_: str) -> str | None:
        """The id for a post that has this one of its own; None where it is to be left out.

        Raises:
            ValueError: it is given out already, and duplicates are an error; or what has it is a
                row that could not be read and is called by its place.
        """
        if self.seen.add(id_):
            return id_
        if self._duplicates == "rename":
            self.num_duplicates += 1
            return self._renamed(id_)
        if id_ in self._invented:
            raise ValueError(
                f"id={id_!r} is how a row that cannot be read is called; change the id"
            )
        if self._duplicates == "error":
            raise ValueError(f"id={id_!r} is there twice; ids must be unique")
        self.num_duplicates += 1
        return None

    def invent(self, place: str) -> str:
        """An id for what has none."""
        id_ = place if self.seen.add(place) else self._renamed(place)
        self._invented.add(id_)
        return id_

    def _renamed(self, id_: str) -> str:
        while not self.seen.add(renamed := f"{id_}#{self.seen.meet_again(id_)}"):
            pass
        return renamed

    def close(self) -> None:
        """Forgets all ids."""
        self.seen.close()
        self._invented.close()


class IdList:
    """A file with an id a line, each once.

    Args:
        path: the file.

    Raises:
        ConfigError: it cannot be read, is empty, or has an id twice.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self._ids = IdSet()
        for number, id_ in numbered_lines(path):
            if not self._ids.add(id_):
                raise ConfigError(
                    f"{path.name} line {number}: id={id_!r} is there twice; ids must be unique",
                    param="split",
                )
        if not self._ids:
            raise ConfigError(f"{path.name} lists no id; write one a line", param="split")

    def __contains__(self, id_: object) -> bool:
        return id_ in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def check_all_in(self, known: Container[str], place: str) -> None:
        """Checks that all listed ids are known.

        Args:
            known: ids that there are.
            place: where they are, for the message.

        Raises:
            ConfigError: some are not; names the first, and how many.
        """
        absent = [(number, id_) for number, id_ in numbered_lines(self.path) if id_ not in known]
        if absent:
            number, id_ = absent[0]
            raise ConfigError(
                f"{self.path.name} line {number}: id={id_!r} is not in {place}; {len(absent)} of "
                f"the {len(self)} ids listed are not",
                param="split",
            )


def list_path(folder: Place, split: str | Place) -> Place:
    """The file of a split: `<split>_ids.txt` in the folder, or the path or URL that `split` is.

    A split is a path when it has a separator or ends in `.txt`.
    """
    if isinstance(split, Path | UrlPath):
        return split
    if "/" in split or split.endswith(".txt"):
        return find_place(split)
    return folder / f"{split}{LIST_SUFFIX}"


def listed_splits(folder: Place) -> list[str]:
    """Names of the splits whose lists are in the folder."""
    names = (path.name for path in folder.iterdir())
    return sorted(name.removesuffix(LIST_SUFFIX) for name in names if name.endswith(LIST_SUFFIX))
