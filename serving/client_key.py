"""The key that our own clients send: from the environment, never a flag, which `ps` would show."""

from __future__ import annotations

import os

from serving.errors import ConfigError

VARIABLE = "SIEVE_API_KEY"


def bearer_headers() -> dict[str, str]:
    """Headers with the key of `SIEVE_API_KEY`; none where it is not set.

    Raises:
        ConfigError: it holds what no key holds.
    """
    key = os.environ.get(VARIABLE, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{VARIABLE} is not a key: a key is printable ASCII without spaces, as "
            "`python -m serving key` prints it",
            param=VARIABLE,
        )
    return {"Authorization": f"Bearer {key}"}
