"""The application on a Ray of our own with two nodes on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions, ProxyLocation

from bench.outcome import BenchError, progress
from bench.process_tree import descendants, is_alive
from bench.processes import stop_on_termination
from serving.cluster.settings import RayAppSettings
from serving.ray_app import NAME, build

ENGINE_CLASS = "bench.poison:PoisonableEngine"
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines on one machine must not share their cores
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": str(Path(__file__).parent.parent),
}


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A replica that runs, as Serve's controller tells it.

    Attributes:
        deployment: Engine, Ingress or Coordinator.
        pid: of its process.
        node: Ray's id of its node.
    """

    deployment: str
    pid: int
    node: str


class RayHome:
    """The running application.

    Args:
        cluster: its nodes.
        settings: of the application.
    """

    def __init__(self, cluster: Cluster, settings: RayAppSettings) -> None:
        self._cluster, self.settings = cluster, settings

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def deploy(self, settings: RayAppSettings) -> None:
        """Deploys the application, again if it runs; returns when every replica is the new one."""
        serve.run(build(settings, ENGINE_CLASS), name=NAME)
        self.settings = settings

    def replicas(self, deployment: str = "Engine") -> list[Replica]:
        """Those that run and whose process lives; none where the controller does not answer."""
        try:
            found = self._details()["applications"][NAME]["deployments"][deployment]["replicas"]
        except (ray.exceptions.RayError, KeyError, ValueError):
            return []
        return [
            Replica(deployment=deployment, pid=each["pid"], node=each["node_id"])
            for each in found
            if each["state"] == "RUNNING" and each["pid"] and is_alive(each["pid"])
        ]

    def controller(self) -> int:
        """Process of Serve's controller.

        Raises:
            BenchError: there is none.
        """
        for pid in descendants(os.getpid()):
            if "ServeController" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        raise BenchError("Serve's controller does not run")

    def _details(self) -> dict[str, Any]:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        found: dict[str, Any] = ray.get(controller.get_serve_instance_details.remote(), timeout=3)
        return found

    def kill_second_node(self) -> str:
        """SIGKILL for the raylet of the node that is not the head; returns the node's id."""
        (node,) = self._cluster.worker_nodes
        raylet = node.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGKILL)
        raylet.wait()
        return str(node.node_id)


@contextlib.contextmanager
def running_home(settings: RayAppSettings, cpus_per_node: int) -> Iterator[RayHome]:
    """Two nodes and the application, ready; all of it ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="sieve-"))
    (folder / "ray").mkdir()
    quiet = {"RAY_prestart_worker_first_driver": "0", "RAY_TMPDIR": str(folder)}
    os.environ.update({**quiet, **_ENVIRONMENT})  # another Ray's address file stays as it is
    node = {"num_cpus": cpus_per_node, "include_dashboard": False, "temp_dir": str(folder)}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    with contextlib.ExitStack() as stack:
        stop_on_termination(stack)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(cluster.shutdown)
        stack.callback(_leave)
        # Ray prints what its nodes complain of; stdout is for the table.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        cluster.add_node(**node)
        ray.init(
            address=cluster.address,
            namespace=NAME,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": _ENVIRONMENT},
        )
        yield _started(cluster, settings, folder)


def _leave() -> None:
    with contextlib.suppress(Exception):  # whatever a drill left of it
        serve.shutdown()
    ray.shutdown()


def _started(cluster: Cluster, settings: RayAppSettings, folder: Path) -> RayHome:
    started = time.perf_counter()
    progress(f"starting {settings.replicas} engines on two Ray nodes (logs in {folder}) ...")
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=settings.host,
            port=settings.port,
            request_timeout_s=None,
            keep_alive_timeout_s=60,
        ),
    )
    home = RayHome(cluster, settings)
    try:
        home.deploy(settings)
    except RuntimeError as error:
        raise BenchError(f"the application did not start: {error}") from error
    progress(f"ready in {time.perf_counter() - started:.0f} s")
    return home
