"""`python -m serving key`: a new API key, and its entry for the file of `--keys`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.errors import ConfigError
from serving.keys import Key, add_key, entry_text, hash_of, new_key, reason_of

_EPILOG = """\
The key is printed once and kept nowhere: the file holds its SHA-256, which is enough for a key of
256 random bits. A server with that file (--keys) notices the change within a second; to take a key
away, delete its entry. Clients send it as 'Authorization: Bearer KEY'; the commands that take
--server send the key in SIEVE_API_KEY.

examples:
  python -m serving key --name ops --admin --file keys.yaml
  python -m serving key --name alice --adapters llavac,sentiment --per-minute 600 --file keys.yaml
  python -m serving --keys keys.yaml --host 0.0.0.0
"""


def key_command(argv: list[str]) -> Callable[[], Coroutine[None, None, int]]:
    """`key` from its arguments.

    Raises:
        ConfigError: one is not allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving key",
        description="Make an API key.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--name", required=True, help="what logs call it")
    add("--admin", action="store_true", help="may change adapters and read /metrics")
    add("--adapters", metavar="A,B", help="models it may ask for, the base's name among them")
    add("--max-concurrency", type=int, metavar="N", help="most requests at once, per HTTP process")
    add("--per-minute", type=int, metavar="N", help="most requests a minute, per HTTP process")
    add("--file", type=Path, help="append the entry there; without it the entry is printed")
    options = parser.parse_args(argv)
    secret = new_key()
    entry = _entry(options, hash_of(secret))

    async def run() -> int:
        if options.file is not None:
            add_key(options.file, entry)
        print(secret)
        print("above: the key; it is not shown again", file=sys.stderr)
        if options.file is None:
            print(f"# its entry for the file of --keys:\n{entry_text(entry)}", end="")
        return 0

    return run


def _entry(options: argparse.Namespace, digest: str) -> Key:
    wanted: dict[str, Any] = {
        "name": options.name,
        "sha256": digest,
        "admin": options.admin,
        "adapters": None if options.adapters is None else options.adapters.split(","),
        "max_concurrency": options.max_concurrency,
        "per_minute": options.per_minute,
    }
    try:
        return Key(**wanted)
    except ValidationError as error:
        field, said = reason_of(error)
        flag = f"--{field[0].replace('_', '-')}"
        raise ConfigError(f"{flag} {wanted[field[0]]!r}: {said}", param=flag) from error
