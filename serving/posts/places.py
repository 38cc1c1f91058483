"""Where posts lie: paths of this machine, and URLs of whatever fsspec opens."""

from __future__ import annotations

import errno
import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec

from serving.errors import ConfigError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class UrlPath:
    """A file or folder behind a URL, with those methods of `Path` that readers of posts need.

    It is a string that is opened when it is read, so that it can be hashed, pickled and sent to
    another machine. Whatever the protocol's package raises is an `OSError` here.

    Attributes:
        url: such as `s3://bucket/posts.jsonl`, or chained as `zip://posts.jsonl::s3://bucket/a.zip`.
    """

    url: str

    @property
    def name(self) -> str:
        """What stands behind the last slash, without a query."""
        return posixpath.basename(self._place[1].rstrip("/"))

    @property
    def suffix(self) -> str:
        """The name's end from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> UrlPath:
        """The folder."""
        scheme, place, behind = self._place
        return UrlPath(f"{scheme}{posixpath.dirname(place.rstrip('/'))}{behind}")

    @property
    def _place(self) -> tuple[str, str, str]:
        """The protocol with `://`, the way to the place, and what is chained behind it."""
        parts = self.url.split("::")
        index = next(i for i, part in enumerate(parts) if "://" in part)
        protocol, _, place = parts[index].partition("://")
        if protocol in ("http", "https"):
            place = place.partition("?")[0]
        before = "".join(f"{part}::" for part in parts[:index])
        behind = "".join(f"::{part}" for part in parts[index + 1 :])
        return f"{before}{protocol}://", place, behind

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> UrlPath:
        scheme, place, behind = self._place
        way = posixpath.normpath(name).lstrip("/")
        while way.startswith("../"):
            way, place = way.removeprefix("../"), posixpath.dirname(place.rstrip("/"))
        return UrlPath(f"{scheme}{place.rstrip('/')}/{way}{behind}")

    def resolve(self) -> UrlPath:
        """Itself: a URL says where it leads."""
        return self

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file, read in blocks as it is used.

        Raises:
            OSError: it is not there or cannot be read.
        """
        assert mode == "rb", "sources are only read"
        system, path = self._opened()
        with _as_os_error(self.name):
            file = system.open(path, "rb")
        return io.BufferedReader(_Stream(system, file, self.name), _BLOCK_BYTES)

    def read_bytes(self) -> bytes:
        """All of the file.

        Raises:
            OSError: it is not there or cannot be read.
        """
        system, path = self._opened()
        with _as_os_error(self.name):
            return bytes(system.cat_file(path))

    def exists(self) -> bool:
        """Whether there is a file or folder.

        Raises:
            OSError: that cannot be told, as where the login is missing.
        """
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder, or the start of the names of some files."""
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[UrlPath]:
        """What is in the folder; fsspec holds the list of names in memory."""
        system, path = self._opened()
        with _as_os_error(self.name):
            names = [posixpath.basename(each.rstrip("/")) for each in system.ls(path, detail=False)]
        return (self / name for name in names if name)

    def _kind(self) -> str | None:
        system, path = self._opened()
        try:
            with _as_os_error(self.name):
                return str(system.info(path)["type"])
        except FileNotFoundError:
            return None

    def _opened(self) -> tuple[Any, str]:
        try:
            return fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            protocol = self._place[0].removesuffix("://")
            raise ConfigError(
                f"{protocol}:// URLs cannot be opened here: {error}; allowed are protocols of "
                "fsspec whose package is installed",
                param="data",
            ) from error


Place = Path | UrlPath
"""A file or folder."""


def find_place(source: Path | str) -> Place:
    """The place that a path or a URL names; `file://` URLs name paths.

    Raises:
        ConfigError: the URL's protocol is unknown, or its package is not installed.
    """
    if isinstance(source, Path) or "://" not in source:
        return Path(source)
    place = UrlPath(source)
    system, path = place._opened()
    names = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    return Path(path) if "file" in names else place


class _Stream(io.RawIOBase):
    """A file of fsspec whose errors are `OSError`s, whatever the protocol raises."""

    def __init__(self, system: Any, file: Any, name: str) -> None:
        self._system = system  # an archive's, which closes the archive when it goes
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with _as_os_error(self._name):
            raw = self._file.read(len(buffer))
        buffer[: len(raw)] = raw
        return len(raw)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _as_os_error(self._name):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _as_os_error(name: str) -> Iterator[None]:
    """Raises what a protocol's package raises as the `OSError` that a path would raise."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", name) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        kinds = (PermissionError, TimeoutError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
        raise kind(getattr(error, "errno", None) or errno.EIO, f"{reason:.300}", name) from error
