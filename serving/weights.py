"""Weights as files: never pickles, which run code when they are read; and their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from serving.errors import ConfigError

_PICKLED = re.compile(r".+\.(?:bin|pt|pth|ckpt|pkl|pickle)", re.I)
_BESIDE_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+", re.I)
"""What Hugging Face's `Trainer` leaves in its folders; nobody here reads it."""
_CHUNK = 1 << 20


def pickled(names: Iterable[str]) -> list[str]:
    """Those of a folder's file names that are weights as pickles."""
    return sorted(n for n in names if _PICKLED.fullmatch(n) and not _BESIDE_WEIGHTS.fullmatch(n))


def pickle_complaint(what: str, names: Iterable[str]) -> str | None:
    """Why a folder with these file names is refused; None where it is not."""
    found = pickled(names)
    if not found:
        return None
    return (
        f"{what} has weights as pickles ({', '.join(found[:3])}), which can run code when they are "
        "read; save it as safetensors and remove them"
    )


def check_base_files(model: str, pinned_sha256: str | None) -> None:
    """Looks at the files of a base checkpoint before anything loads them.

    Args:
        model: a local folder; of a Hugging Face id nothing is known here, and the engine then
            loads safetensors only as well.
        pinned_sha256: what `folder_sha256` must give, if anything.

    Raises:
        ConfigError: there are pickled weights, or the files are not those that were pinned.
    """
    folder = Path(model)
    if not folder.is_dir():
        if pinned_sha256 is not None:
            raise ConfigError(
                f"base_sha256 needs a local folder, and model={model!r} is none; download it first",
                param="base_sha256",
            )
        return
    complaint = pickle_complaint(f"model={model!r}", (path.name for path in folder.iterdir()))
    if complaint is not None:
        raise ConfigError(complaint, param="model")
    if pinned_sha256 is not None and (actual := folder_sha256(folder)) != pinned_sha256.lower():
        raise ConfigError(
            f"model={model!r} has SHA-256 {actual}, base_sha256 says {pinned_sha256}: the files "
            "are not those that were pinned",
            param="base_sha256",
        )


def folder_sha256(folder: Path) -> str:
    """One hash over all files of a folder.

    That of what `LC_ALL=C sha256sum *` prints there, so that a shell can check it. Reads every
    byte: some ten seconds for 14 GB.
    """
    paths = (path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    lines = [
        f"{file_sha256(path)}  {path.name}\n"
        for path in sorted(paths, key=lambda path: path.name.encode())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
