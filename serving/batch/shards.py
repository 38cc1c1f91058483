"""A run's folder: journals of shards being worked on, and shards that are done.

    out/labels-00000.jsonl   errors-00000.jsonl   review-00000.jsonl     for people
    out/.batch/run.json                                                  what was asked for
    out/.batch/00000.journal                                             a line a finished post
    out/.batch/00000.ready/                                              about to be published
    out/.batch/00000.json                                                done: counts, ids

A shard is a fixed number of consecutive posts. Its files are written into a folder that is renamed
to `.ready`: from that moment the shard is decided, and moving its files into place can be repeated.
The last file moved is its commit. So a process that is killed anywhere leaves every post either in
exactly one published row, or in a journal, or to be labelled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from serving.batch.counts import Counts
from serving.batch.outcomes import Outcome
from serving.errors import ConfigError

STATE = ".batch"
COMMIT = "commit.json"
HELPERS_END_S = 60.0


class IdsDigest:
    """A digest of the ids of a shard, in order: tells whether the input is still the same."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_ids = 0

    def add(self, id_: str) -> None:
        """Adds the next id."""
        raw = id_.encode(errors="surrogatepass")
        self._hash.update(len(raw).to_bytes(4, "little") + raw)
        self.num_ids += 1

    def hexdigest(self) -> str:
        """Of the ids so far."""
        return self._hash.hexdigest()


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
        path: of the folder; made where it is not there.

    Raises:
        ConfigError: it cannot be written, or another process works on it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / STATE
        with writing(path):
            self.state.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether a run noted there what it was asked for."""
        return (path / STATE / "run.json").exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out and ends what a killed one left; a killed process lets go by itself.

        Raises:
            ConfigError: another process works on it, or it cannot be written.
        """
        with writing(self.path):
            file = (self.state / "lock").open("w")
        with file:
            if not _locks(file):
                raise ConfigError(
                    f"out={str(self.path)!r}: another run works on it; wait for it or stop it",
                    param="out",
                )
            self.wait_for_helpers()
            self.recover()
            yield

    @contextmanager
    def helped(self) -> Iterator[None]:
        """Keeps later runs waiting while this process works for the run that holds the folder."""
        with writing(self.path):
            file = self._helpers.open("a")
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def wait_for_helpers(self, most_s: float = HELPERS_END_S) -> None:
        """Waits until no process works in `helped`: those of a killed run end a little later.

        Raises:
            ConfigError: some still does.
        """
        deadline = time.monotonic() + most_s
        with writing(self.path):
            file = self._helpers.open("a")
        with file:
            while not _locks(file):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"out={str(self.path)!r}: engines of a run before this one still work on "
                        "it; wait for them or stop them",
                        param="out",
                    )
                time.sleep(0.1)

    @property
    def _helpers(self) -> Path:
        return self.state / "helpers"

    def recover(self) -> None:
        """Finishes shards that are decided, and removes what no shard needs any more."""
        with writing(self.path):
            for making in self.state.glob("*.making"):
                shutil.rmtree(making)
            for ready in sorted(self.state.glob("*.ready")):
                self.finish(int(ready.stem))
            for journal in self.state.glob("*.journal"):
                commit = self._commit(int(journal.stem))
                if commit.exists() and not json.loads(commit.read_text())["failed"]:
                    journal.unlink()

    def check_same(self, asked: Mapping[str, Any]) -> bool:
        """Notes what is asked for, or compares it with what was; whether the run goes on.

        Raises:
            ConfigError: the folder holds another run, or files that no run made.
        """
        path = self.state / "run.json"
        if not path.exists():
            strangers = sorted(item.name for item in self.path.iterdir() if item.name != STATE)
            if strangers:
                raise ConfigError(
                    f"out={str(self.path)!r} has files of another origin ({strangers[0]!r}); name "
                    "an empty or new folder",
                    param="out",
                )
            with writing(self.path):
                write_whole(path, json.dumps(asked, indent=2))
            return False
        before = json.loads(path.read_text())
        for name in asked:
            if before.get(name) != asked.get(name):
                raise ConfigError(
                    f"out={str(self.path)!r} was begun with {name}={before.get(name)!r}, now it is "
                    f"{asked.get(name)!r}; repeat the same command, or name another folder",
                    param=name,
                )
        return True

    def commits(self, shards: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        """Shards that are done: `posts`, `failed` and the digest `ids` of each.

        Args:
            shards: only these, whose decided ones are finished first; None for all.
        """
        for index in shards or ():
            if self._ready(index).exists():
                self.finish(index)
        return {
            index: {name: commit[name] for name in ("posts", "failed", "ids")}
            for index, commit in self._read_commits(shards)
        }

    def counts(self) -> Counts:
        """Of all published posts."""
        counts = Counts()
        for _, commit in self._read_commits():
            counts += Counts(commit["counts"])
        return counts

    def _read_commits(
        self, shards: Iterable[int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if shards is None:
            shards = [int(path.stem) for path in self.state.glob("[0-9]*.json")]
        for index in shards:
            if self._commit(index).exists():
                yield index, json.loads(self._commit(index).read_text())

    def publish(self, index: int, files: Mapping[str, Callable[[Path], None]], commit: Any) -> None:
        """Decides a shard: all of its files or none.

        Args:
            index: of the shard.
            files: kind (`labels.jsonl`) to what writes it.
            commit: JSON that says it is done; `files` names the kinds.
        """
        making = self.state / f"{index:05d}.making"
        with writing(self.path):
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            for kind, write in files.items():
                write(making / kind)
                _sync(making / kind)
            write_whole(making / COMMIT, json.dumps({**commit, "files": sorted(files)}))
            making.rename(self._ready(index))
            self.finish(index)

    def finish(self, index: int) -> None:
        """Moves a decided shard's files into place; may be repeated after a kill."""
        ready, commit = self._ready(index), self._commit(index)
        with writing(self.path):
            if (ready / COMMIT).exists():  # else the kill came when only the empty folder was left
                kinds = json.loads((ready / COMMIT).read_text())["files"]
                before = json.loads(commit.read_text())["files"] if commit.exists() else []
                for kind in set(before) - set(kinds):
                    (self.path / named(kind, index)).unlink(missing_ok=True)
                for kind in kinds:
                    if (ready / kind).exists():
                        (ready / kind).replace(self.path / named(kind, index))
                (ready / COMMIT).replace(commit)
            ready.rmdir()

    def _commit(self, index: int) -> Path:
        return self.state / f"{index:05d}.json"

    def _ready(self, index: int) -> Path:
        return self.state / f"{index:05d}.ready"

    def journal(self, index: int) -> Path:
        """A shard's journal."""
        return self.state / f"{index:05d}.journal"


class Journal:
    """Finished posts of one shard, a line each; a line that a kill tore is dropped.

    Args:
        path: of the file.
        keeps_errors: False tries failed posts again.
    """

    def __init__(self, path: Path, *, keeps_errors: bool = True) -> None:
        self.path = path
        self.outcomes: dict[int, Outcome] = {}
        with writing(path):
            self._file = path.open("a+b", buffering=0)
            self._size = 0
            for line in self._lines():
                outcome = Outcome.from_line(line.decode(errors="surrogatepass"))
                self.outcomes[outcome.index] = outcome
            self._file.truncate(self._size)
        if not keeps_errors:
            self.outcomes = {i: o for i, o in self.outcomes.items() if o.error is None}

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._size += len(line)
                yield line

    def add(self, outcome: Outcome) -> None:
        """Notes a finished post; a killed process has it, a lost machine may not.

        Raises:
            ConfigError: the disk is full; the journal is as it was.
        """
        line = outcome.to_line().encode(errors="surrogatepass")
        with writing(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(self._size)
                raise
        self._size += len(line)
        self.outcomes[outcome.index] = outcome

    def close(self) -> None:
        """Closes the file, which stays."""
        self._file.close()


def named(kind: str, index: int) -> str:
    """A published file's name: `labels.jsonl` of shard 3 is `labels-00003.jsonl`."""
    stem, suffix = kind.split(".", 1)
    return f"{stem}-{index:05d}.{suffix}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Trouble with the output's disk as a clear end; what is there stays as it is.

    Raises:
        ConfigError: the disk is full, or may not be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"out={str(path)!r} cannot be written: {error.strerror or error}; everything published "
            "stays, run the same command again when that is mended",
            param="out",
            code="output_unwritable",
        ) from error


def _locks(file: IO[str]) -> bool:
    """Takes a lock that no other process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    _sync(part)
    part.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
