"""Asks a server's /healthz five times a second, from a process of its own.

Beside a load generator in one process it would time that. `python -m bench.health URL` says
`ready`, looks until its standard input ends, and prints what it saw as a JSON list: milliseconds,
or null where the server was not green.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time

import httpx

_LOOK_S = 0.2


class HealthWatch:
    """Looks at a server's health while its block runs.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.looks_ms: list[float] = []

    def __enter__(self) -> HealthWatch:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.health", self._url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # ready
        return self

    def __exit__(self, *exception: object) -> None:
        said, _ = self._process.communicate()
        self.looks_ms = [float("inf") if ms is None else ms for ms in json.loads(said)]


def look(url: str) -> list[float | None]:
    """Every look until standard input ends."""
    looks: list[float | None] = []
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
            started = time.perf_counter()
            try:
                is_green = client.get("/healthz").status_code == 200
            except httpx.HTTPError:
                is_green = False
            looks.append(1e3 * (time.perf_counter() - started) if is_green else None)
    return looks


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
