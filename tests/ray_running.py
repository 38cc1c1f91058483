"""The Ray home as a user starts it, with the interface of `tests.running.RunningServer`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from serving.cluster.settings import RayAppSettings
from serving.facts import engine_info
from serving.server import catalogue_of
from tests.running import Client, free_port

ROOT = Path(__file__).resolve().parent.parent
_PUSHED_S = 2.5
_START_S = 480


class RayServer(Client):
    """`python -m serving --ray` in processes of its own."""

    def __init__(self, log: Path, **settings: Any) -> None:
        super().__init__()
        self.settings = RayAppSettings(port=free_port(), max_num_seqs=16, **settings)
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self._log = log

    def __enter__(self) -> RayServer:
        given = self.settings.model_dump(exclude_unset=True, mode="json")
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--ray", "--ray-cpus=8", *flags],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.terminate()  # nobody else ends it
            raise
        facts = SimpleNamespace(info=engine_info(self.settings))
        self.labeler = SimpleNamespace(engine=facts, catalogue=catalogue_of(self.settings))
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            assert self._process.poll() is None, self.log_text()[-3000:]
            assert time.monotonic() < deadline, self.log_text()[-3000:]
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(timeout=120) == 0, self._log.read_text()[-3000:]

    def tower_images(self) -> int:
        time.sleep(_PUSHED_S)  # engines push their metrics every second
        return int(self.metric("sieve_tower_images"))

    def log_text(self) -> str:
        """The log so far."""
        return self._log.read_text()

    def log_objects(self) -> list[dict[str, Any]]:
        """Lines of the log that are JSON objects, whatever Ray wrote before them."""
        lines = [line[line.find("{") :] for line in self.log_text().splitlines()]
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [item for item in found if isinstance(item, dict)]
