"""How long to wait before a request is sent again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a request is tried, and the wait in between: doubling from `base_s` to `most_s`."""

    num_tries: int = 8
    base_s: float = 0.25
    most_s: float = 8.0
    most_asked_s: float = 60.0

    def wait_s(self, tried: int, retry_after: str | None = None) -> float:
        """Seconds until the next try: what the server asked for at least, and a little jitter."""
        backoff = min(self.most_s, self.base_s * 2 ** (tried - 1))
        asked = min(self.most_asked_s, _parse_retry_after(retry_after))
        return max(backoff, asked) * random.uniform(1.0, 1.25)


def _parse_retry_after(value: str | None) -> float:
    """Seconds of a `Retry-After` header, a number or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
