"""Where adapters lie, a local folder or any fsspec URL, and the private copies that engines load.

A folder holds one adapter a subfolder, `name` or `name@version`. Engines load a copy of their own:
vLLM reads an evicted adapter again in the middle of a step, where a file that was overwritten or
removed meanwhile would end the engine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from serving.errors import AdapterError
from serving.manifest import MANIFEST_NAME
from serving.protocol import Adapter
from serving.weights import file_sha256, pickle_complaint

_COPIES = "sieve-adapters-"
_FILES = ("adapter_config.json", "adapter_model.safetensors", MANIFEST_NAME)


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter that was found, not yet looked into.

    Attributes:
        name: what clients call it.
        version: what follows `@` in its folder's name, or nothing.
        path: local folder or URL.
    """

    name: str
    version: str
    path: str

    @property
    def age(self) -> tuple[tuple[int, int, str], ...]:
        """Sorts versions as people count: 9 before 10, none before any."""
        parts = re.findall(r"\d+|\D+", self.version)
        return tuple((1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts)


class AdapterFolder:
    """A folder of adapters.

    Args:
        url: a local path or an fsspec URL such as `s3://bucket/adapters`.

    Raises:
        AdapterError: it does not exist, or its kind of URL needs a package that is missing.
    """

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
            is_there = self._files.isdir(self._root)
        except (ImportError, ValueError, OSError) as error:
            raise AdapterError(f"adapters folder {url!r}: {error}", param="adapters") from error
        if not is_there:
            raise AdapterError(f"adapters folder {url} does not exist", param="adapters")
        self.is_local = "file" in _protocols(self._files)

    def list(self) -> list[AdapterSource]:
        """Subfolders that hold an adapter, by name and age."""
        self._files.invalidate_cache()
        sources = []
        for item in self._files.ls(self._root, detail=True):
            path = str(item["name"]).rstrip("/")
            if item["type"] != "directory" or not self._files.exists(f"{path}/{_FILES[0]}"):
                continue
            name, _, version = path.rsplit("/", 1)[-1].partition("@")
            url = path if self.is_local else str(self._files.unstrip_protocol(path))
            sources.append(AdapterSource(name=name, version=version, path=url))
        return sorted(sources, key=lambda source: (source.name, source.age))

    def read_text(self, name: str) -> str | None:
        """A file beside the adapters, or None where there is none."""
        path = f"{self._root}/{name}"
        if not self._files.exists(path):
            return None
        return str(self._files.cat_file(path).decode("utf-8"))

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file beside the adapters, never leaving half of one.

        Raises:
            OSError: the folder cannot be written.
        """
        path = f"{self._root}/{name}"
        if not self.is_local:  # object stores replace whole objects
            self._files.pipe_file(path, text.encode("utf-8"))
            return
        draft = Path(f"{path}.draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def copy_adapter(path: str, into: Path) -> None:
    """Copies an adapter's files from a folder or URL.

    Raises:
        AdapterError: it is gone, cannot be read, or has pickled weights.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        files, root = fsspec.core.url_to_fs(path)
        names = (str(item).rsplit("/", 1)[-1] for item in files.ls(root, detail=False))
        complaint = pickle_complaint(f"adapter {path.rsplit('/', 1)[-1]!r}", names)
        if complaint is not None:
            raise AdapterError(complaint)
        for name in _FILES:
            if files.exists(f"{root}/{name}"):
                files.get_file(f"{root}/{name}", str(into / name))
    except (ImportError, OSError, ValueError) as error:
        raise AdapterError(
            f"adapter {path.rsplit('/', 1)[-1]!r} cannot be read: {type(error).__name__}"
        ) from error


def digest_of(folder: Path) -> str:
    """Tells an adapter's contents apart: every byte of configuration, weights and manifest.

    Raises:
        AdapterError: a file is missing.
    """
    digest = hashlib.sha256()
    try:
        for name in _FILES:
            is_missing = name == MANIFEST_NAME and not (folder / name).exists()
            digest.update(b"-" if is_missing else file_sha256(folder / name).encode())
    except OSError as error:
        raise AdapterError(
            f"adapter {folder.name!r}: {type(error).__name__} in its files"
        ) from error
    return digest.hexdigest()[:32]


def _remove_orphans(folder: Path) -> None:
    """Copies of processes on this machine that were killed before they could remove them."""
    for path in folder.glob(f"{_COPIES}*-*"):
        pid = path.name.removeprefix(_COPIES).split("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


class PrivateCopies:
    """An engine's own copies of the adapters it may load; gone when it closes."""

    def __init__(self) -> None:
        _remove_orphans(Path(tempfile.gettempdir()))
        self._root = Path(tempfile.mkdtemp(prefix=f"{_COPIES}{os.getpid()}-"))

    def path(self, adapter: Adapter) -> Path:
        """Where an adapter's copy is or would be; other contents have another path."""
        return self._root / adapter.key

    def take(self, adapter: Adapter) -> Path:
        """Copies an adapter, unless it is here already. May take seconds: not in an event loop.

        Raises:
            AdapterError: it is gone, or its files are no longer those that were registered.
        """
        path = self.path(adapter)
        if path.is_dir():
            return path
        draft = Path(tempfile.mkdtemp(dir=self._root, prefix=".draft-"))
        try:
            copy_adapter(adapter.path, draft)
            if adapter.digest and digest_of(draft) != adapter.digest:
                raise AdapterError(
                    f"the files of adapter {adapter.name!r} changed after it was registered; "
                    "register it again, better as a new version (a folder name@version)"
                )
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path

    def drop(self, adapter: Adapter) -> None:
        """Removes an adapter's copy."""
        shutil.rmtree(self.path(adapter), ignore_errors=True)

    def close(self) -> None:
        """Removes all."""
        shutil.rmtree(self._root, ignore_errors=True)


def _protocols(files: Any) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
