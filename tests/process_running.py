"""The server as a process of its own, with the interface of `tests.running.RunningServer`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tests.running import Client, free_port

ROOT = Path(__file__).resolve().parent.parent


class ProcessServer(Client):
    """`python -m serving` with settings given as environment variables, so that all are alike."""

    def __init__(self, log: Path, **settings: Any) -> None:
        super().__init__()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        given = {"port": self.port, "max_num_seqs": 16, **settings}
        self._environment = {f"SIEVE_{name.upper()}": str(each) for name, each in given.items()}

    def __enter__(self) -> ProcessServer:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving"],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **self._environment,
                },
            )
        deadline = time.monotonic() + 500
        while not self._is_ready():
            assert self._process.poll() is None, self.log()[-3000:]
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.2)
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            assert self._process.wait(timeout=120) == 0, self.log()[-3000:]
        finally:
            self._process.kill()
