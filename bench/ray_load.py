"""The application on a Ray of its own, in a process that scales it when told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.outcome import BenchError
from bench.processes import free_port

_NAMES = ("ProxyActor", "Ingress", "Engine", "Coordinator", "EngineCore", "Worker")


class ScaledApp:
    """A running application.

    Args:
        process: that owns it; a number on its stdin is how many engines there shall be.
        port: of its HTTP side.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self.url = process, f"http://127.0.0.1:{port}"

    def scale(self, count: int) -> None:
        """Returns once so many engines run.

        Raises:
            BenchError: the application ended.
        """
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        self.wait()

    def wait(self) -> None:
        """Waits for the owner's word that all engines run.

        Raises:
            BenchError: it ended instead.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "ready":
                return
        raise BenchError("the application on Ray ended; its log is on stderr")

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of each kind of process that takes part."""
        totals = dict.fromkeys(_NAMES, 0.0)
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title, times = " ".join(process.cmdline()), process.cpu_times()
                name = next((n for n in _NAMES if title.endswith(n) or f":{n}" in title), None)
                if name is not None:
                    totals[name] += times.user + times.system
        return totals


def cores_of(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> str:
    """Cores that each kind of process kept busy, the busiest first."""
    used = {name: (after[name] - before[name]) / seconds for name in before}
    ranked = sorted(used.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.2f}" for name, value in ranked if value >= 0.05)


@contextlib.contextmanager
def scaled(
    folder: Path, engine_class: str, count: int, environment: Mapping[str, str]
) -> Iterator[ScaledApp]:
    """The demo's application with engines of a class; it ends with the block."""
    port = free_port()
    arguments = json.dumps({"port": port, "engine_class": engine_class, "count": count})
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.ray_load", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
            start_new_session=True,
        )
        try:
            app = ScaledApp(process, port)
            app.wait()
            yield app
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def main(arguments: str) -> None:
    """Runs the application; reads the wanted number of engines from stdin until that ends."""
    import ray
    from ray import serve

    from serving.cluster.settings import RayAppSettings
    from serving.ray_app import NAME, build

    given = json.loads(arguments)
    environment = {n: v for n, v in os.environ.items() if n.startswith(("VLLM", "STUB", "OMP"))}
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        namespace=NAME,
        runtime_env={"env_vars": environment | {"PYTHONPATH": os.getcwd()}},
    )

    def deploy(count: int) -> None:
        chosen: dict[str, Any] = {
            "replicas": str(count),
            "port": given["port"],
            "max_num_seqs": 16,
            "prefix_caching": False,
        }
        settings = RayAppSettings(**chosen)
        serve.run(build(settings, given["engine_class"]), name=NAME)
        print("ready", flush=True)

    serve.start(http_options={"host": "127.0.0.1", "port": given["port"]})
    try:
        deploy(given["count"])
        for line in sys.stdin:
            deploy(int(line))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
