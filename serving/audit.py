"""What must be known afterwards: changes of adapters and keys, and keys that were refused.

One JSON object a line on stderr, whatever `--log-level` and `--log-format` say. A line names keys
by their name; it never holds a key or its hash.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from serving.errors import SieveError
from serving.keys import caller

logger = logging.getLogger("sieve.audit")
logger.setLevel(logging.INFO)

_PERIOD_S = 10.0


def audit(what: str, **fields: object) -> None:
    """Logs an event.

    Args:
        what: it was, e.g. `adapter_added`.
        fields: of it; values that are None are left out.
    """
    key = caller.get()
    _log({"what": what, "key": key.name if key else None, **fields})


def _log(fields: Mapping[str, object]) -> None:
    line = {name: value for name, value in fields.items() if value is not None}
    logger.info(json.dumps(line, default=str), extra={"fields": line})


@contextmanager
def audited(done: str, refused: str, **fields: object) -> Iterator[None]:
    """Logs how a change ended: `done`, or `refused` with the reason."""
    try:
        yield
    except SieveError as error:
        audit(refused, code=error.code, reason=error.message[:500], **fields)
        raise
    audit(done, **fields)


class Refusals:
    """Keys that were refused, as counts: a flood of them is a line every ten seconds.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: Counter[tuple[str, str | None]] = Counter()
        self._told_at = -_PERIOD_S

    def add(self, code: str | None, name: str | None) -> None:
        """Counts one.

        Args:
            code: why.
            name: of the key, where it is known.
        """
        self._counts[code or "", name] += 1
        self.tell()

    def tell(self) -> None:
        """Logs what was counted, if the last lines are ten seconds old."""
        if not self._counts or self._clock() - self._told_at < _PERIOD_S:
            return
        self._told_at = self._clock()
        for (code, name), count in self._counts.items():
            _log({"what": "requests_refused", "key": name, "code": code, "count": count})
        self._counts.clear()
