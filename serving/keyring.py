"""The keys a server knows now, and how much of its limits each has used in this process."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.audit import audit
from serving.errors import ConfigError, KeyLimitError
from serving.keys import Key, read_keys

logger = logging.getLogger("sieve")
Clock = Callable[[], float]

_LOOK_S = 1.0
_LONGEST_WAIT_S = 60


class Keyring:
    """Keys of a file that may change while the server runs; a broken new file changes nothing.

    Args:
        path: of the file.
        clock: seconds that only grow.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._stamp, self._looked_at = _stamp(path), clock()
        self._keys = read_keys(path)
        self._allowances: dict[str, Allowance] = {}
        audit("keys_read", names=[key.name for key in self._keys])

    def find(self, token: bytes) -> Key | None:
        """Whose key this is; takes as long whichever it is.

        Args:
            token: what the client sent.
        """
        self._look_again()
        digest = hashlib.sha256(token).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def allowance(self, key: Key) -> Allowance:
        """What a key has used; it keeps that when the file changes."""
        return self._allowances.setdefault(key.name, Allowance(self._clock))

    def _look_again(self) -> None:
        if self._clock() - self._looked_at < _LOOK_S:
            return
        self._looked_at = self._clock()
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read_keys(self._path)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error.message)
            audit("keys_unusable", reason=error.message)
            return
        _audit_changes(self._keys, keys)
        self._keys = keys
        kept = {key.name for key in keys}
        self._allowances = {n: used for n, used in self._allowances.items() if n in kept}


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Other contents have another one; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _audit_changes(before: Sequence[Key], after: Sequence[Key]) -> None:
    old, new = ({key.name: key for key in keys} for keys in (before, after))
    audit(
        "keys_changed",
        added=sorted(new.keys() - old.keys()),
        removed=sorted(old.keys() - new.keys()),
        changed=sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    )


class Allowance:
    """One key's requests now and of late.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._inside, self._mean_s = 0, 1.0
        self._tokens, self._filled_at = math.inf, clock()

    @contextmanager
    def passage(self, key: Key) -> Iterator[None]:
        """One request's time; limits are those that the key has now.

        Raises:
            KeyLimitError: the key has as many requests as it may, at once or in a minute.
        """
        self._check_places(key)
        self._spend(key)
        self._inside += 1
        started = self._clock()
        try:
            yield
        finally:
            self._inside -= 1
            self._mean_s += 0.1 * (self._clock() - started - self._mean_s)

    def _check_places(self, key: Key) -> None:
        """The wait is the time in which one of its requests ends, as they went so far."""
        if key.max_concurrency is not None and self._inside >= key.max_concurrency:
            raise _refused(
                f"key {key.name!r} has {self._inside} requests at work, allowed are "
                f"{key.max_concurrency} at once",
                "key_concurrency",
                self._mean_s / key.max_concurrency,
            )

    def _spend(self, key: Key) -> None:
        """Takes a token of a bucket that holds a minute's; the wait is until the next one."""
        if key.per_minute is None:
            self._tokens = math.inf  # a limit that is set later starts with a full bucket
            return
        now, per_second = self._clock(), key.per_minute / 60
        grown = self._tokens + (now - self._filled_at) * per_second
        self._tokens, self._filled_at = min(grown, float(key.per_minute)), now
        if self._tokens < 1:
            raise _refused(
                f"key {key.name!r} may send {key.per_minute} requests a minute",
                "key_rate",
                (1 - self._tokens) / per_second,
            )
        self._tokens -= 1


def _refused(message: str, code: str, wait_s: float) -> KeyLimitError:
    error = KeyLimitError(f"{message}; try again in the seconds that Retry-After says", code=code)
    error.retry_after_s = min(_LONGEST_WAIT_S, max(1, math.ceil(wait_s)))
    return error
