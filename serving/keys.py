"""API keys: who has one, what it may do, and the file they are kept in.

The file holds SHA-256 of each key. A plain hash is right here, where it would not be for passwords:
keys are 256 random bits (`new_key`), which nobody finds by trying, however fast the hash is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from serving.errors import ConfigError

MOST_KEYS = 1000
_MOST_BYTES = 1_000_000
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_SALT_PURPOSE = b"llava-sieve prefix cache"

Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Key(BaseModel):
    """One key of the file; the key itself is not known to the server.

    Attributes:
        name: what logs call it.
        sha256: of the key, in hex.
        admin: whether it may change adapters and read metrics.
        adapters: models it may ask for, the base model's name among them; None is all.
        max_concurrency: requests it may have at a server at once.
        per_minute: requests it may send in a minute; after a quiet one, as many at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=_NAME)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")] = Field(repr=False)
    admin: bool = False
    adapters: Annotated[list[Model], Field(min_length=1)] | None = None
    max_concurrency: Annotated[int, Field(gt=0)] | None = None
    per_minute: Annotated[int, Field(gt=0)] | None = None

    @cached_property
    def digest(self) -> bytes:
        """The hash's 32 bytes."""
        return bytes.fromhex(self.sha256)

    @cached_property
    def cache_salt(self) -> str:
        """Keeps other keys from hitting what this one cached; it does not tell the hash."""
        return hmac.new(self.digest, _SALT_PURPOSE, hashlib.sha256).hexdigest()[:32]

    def may_use(self, model: str) -> bool:
        """Whether requests with this key may ask for a model."""
        return self.adapters is None or model in self.adapters


caller: ContextVar[Key | None] = ContextVar("caller", default=None)
"""Key of the request that is being served; None where the server asks for none."""


def salt_of_caller() -> str | None:
    """The prefix-cache salt of the request that is being served."""
    key = caller.get()
    return key.cache_salt if key else None


def new_key() -> str:
    """A key of 256 random bits."""
    return f"sieve-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read, is no list of keys, or has a name or a key twice. The
            message holds nothing of the file but names: a key may stand there by mistake.
    """
    keys = _parse(_text_of(path), path)
    if not keys:
        raise _unusable(path, "has no keys, so every request would be refused; make one with "
                        f"`python -m serving key --name NAME --file {path.name}`")  # fmt: skip
    return keys


def add_key(path: Path, key: Key) -> None:
    """Appends a key to a file, which it makes (mode 0600) where there is none; comments stay.

    Raises:
        ConfigError: the file cannot be used or written, or has a key of that name.
    """
    path = path.resolve()
    try:
        with _alone_in(path.parent):
            text = _text_of(path) if path.exists() else ""
            if text and not text.endswith("\n"):
                text += "\n"
            text += entry_text(key)
            _parse(text, path)
            _replace(path, text)
    except OSError as error:
        raise _unusable(path, f"cannot be written: {error.strerror}") from error


def entry_text(key: Key) -> str:
    """A key as an item of the file."""
    fields = key.model_dump(exclude_defaults=True)
    text: str = yaml.safe_dump([fields], sort_keys=False)
    return text


def _text_of(path: Path) -> str:
    try:
        status = path.stat()
        if status.st_mode & stat.S_IWOTH:
            raise _unusable(path, "may be written by anybody; `chmod 600` it")
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise _unusable(path, f"is not a file of up to {_MOST_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise _unusable(path, f"cannot be read: {reason}") from error


def _parse(text: str, path: Path) -> tuple[Key, ...]:
    try:
        found: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise _unusable(path, f"is not YAML{where}") from None
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) > MOST_KEYS:
        raise _unusable(path, f"must be a list of up to {MOST_KEYS} keys: '- name: ...'")
    try:
        keys = _KEYS.validate_python(found)
    except ValidationError as error:
        (index, *field), said = reason_of(error)
        raise _unusable(path, f"entry {int(index) + 1}{_named(field)}: {said}") from None
    _check_unique(keys, path)
    return tuple(keys)


_KEYS = TypeAdapter(list[Key])
_PATTERNS = {
    "name": "a name is 1 to 64 letters, digits, '.', '_' or '-'",
    "sha256": "the SHA-256 of a key is 64 hexadecimal digits; `python -m serving key` makes both",
}


def reason_of(error: ValidationError) -> tuple[list[str], str]:
    """Where pydantic's first complaint is and what it is, without the value: it may be a key."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = [str(part) for part in first["loc"]]
    said = [_PATTERNS[part] for part in where if part in _PATTERNS]
    return where, (said or [first["msg"]])[0]


def _named(field: Sequence[str]) -> str:
    """Where in an entry; an unknown field's name may be anything and is cut."""
    return "".join(f", {part[:20]!r}" for part in field[:1])


def _check_unique(keys: Sequence[Key], path: Path) -> None:
    names = Counter(key.name for key in keys)
    if twice := [name for name, count in names.items() if count > 1]:
        raise _unusable(path, f"has the name {twice[0]!r} twice; names tell keys apart in logs")
    hashes: dict[bytes, str] = {}
    for key in keys:
        if key.digest in hashes:
            raise _unusable(path, f"gives {hashes[key.digest]!r} and {key.name!r} the same key")
        hashes[key.digest] = key.name


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"keys={str(path)!r} {reason}", param="keys")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two commands at once must not lose each other's key."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    """Writes all of a file or nothing of it; a temporary file has mode 0600."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def describe_access(keys: Path | None, host: str) -> str | None:
    """A line for the operator: which keys there are, or that none is asked for where it matters.

    Raises:
        ConfigError: the file cannot be used.
    """
    if keys is not None:
        known = read_keys(keys)
        num_admin = sum(key.admin for key in known)
        return f"keys: {len(known)}, of which {num_admin} may change adapters"
    if host == "localhost" or re.fullmatch(r"127(\.\d+){3}|::1", host):
        return None
    return (
        f"WARNING: --host {host} without --keys: whoever reaches this machine may use the server "
        "and change its adapters; see `python -m serving key --help`"
    )
