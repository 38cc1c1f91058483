"""ray_cluster.yaml on one machine: its autoscaler starts and ends nodes that are only processes.

    .venv/bin/python setup/fake_cluster.py --port 6399

Node types, limits, timeouts and the head's start command are the file's own, token auth included;
the provider is Ray's fake one, and setup, images and ports are left out. GPUs are counted,
not there: deploy something that needs none. Ctrl-C ends every process of it, and no other Ray.
"""

from __future__ import annotations

import argparse
import copy
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "ray_cluster.yaml"

HEAD_TYPE = "ray.head.default"  # the only name that Ray's fake provider knows
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "0" * 5
NOT_RUN = ("setup_commands", "head_setup_commands", "worker_setup_commands")
KEPT = ("max_workers", "upscaling_speed", "idle_timeout_minutes", "head_node_type")
# Of the head's start command: ports and files belong to the machine it runs on.
REPLACED = ("--port", "--object-manager-port", "--autoscaling-config")
MARK = "SIEVE_FAKE_CLUSTER"  # in the environment of every process of a fake cluster
OBJECT_STORE_BYTES = 100_000_000


def fake_form(
    config: dict[str, Any], gcs_address: str, idle_minutes: float | None = None
) -> dict[str, Any]:
    """The cluster file for Ray's fake provider.

    Args:
        config: the content of ray_cluster.yaml.
        gcs_address: of the head, for its nodes to join.
        idle_minutes: instead of the file's own timeout.
    """
    assert config["head_node_type"] == HEAD_TYPE
    fake = {key: copy.deepcopy(config[key]) for key in KEPT}
    if idle_minutes is not None:
        fake["idle_timeout_minutes"] = idle_minutes
    fake["cluster_name"] = f"fake-{config['cluster_name']}"
    fake["provider"] = {
        # Ray's own name for it, fake_multinode, wants a file of defaults that the wheel lacks.
        "type": "external",
        "module": PROVIDER,
        "disable_node_updaters": True,
        "gcs_address": gcs_address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
    }
    fake.update({"auth": {}, "file_mounts": {}, "cluster_synced_files": []})
    fake.update({key: [] for key in NOT_RUN})
    fake["available_node_types"] = {
        name: {**kind, "node_config": {}, "resources": fake_resources(kind["resources"])}
        for name, kind in config["available_node_types"].items()
    }
    return fake


def fake_resources(resources: dict[str, int]) -> dict[str, int]:
    """A node type's resources with a small object store, since all nodes share one memory."""
    return {**resources, "object_store_memory": OBJECT_STORE_BYTES}


def head_command(config: dict[str, Any], *options: str) -> tuple[dict[str, str], list[str]]:
    """The environment and arguments of the file's last head start command, with other ports."""
    words = shlex.split(config["head_start_ray_commands"][-1].split(";")[-1])
    start = words.index("ray")
    environment = dict(word.split("=", 1) for word in words[:start])
    arguments = [word for word in words[start:] if word.split("=")[0] not in REPLACED]
    return environment, [*arguments, *options]


class FakeCluster:
    """A running fake cluster; leaving the block ends its processes.

    Args:
        port: of the head's GCS; any free one by default.
        idle_minutes: instead of the file's own timeout.
    """

    def __init__(self, port: int | None = None, idle_minutes: float | None = None) -> None:
        self.address = f"127.0.0.1:{port or free_port()}"
        self.dashboard = f"127.0.0.1:{free_port()}"
        self._idle_minutes = idle_minutes
        # Sockets live here, so its path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._token = self.folder / "auth_token"

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to be let in."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_ADDRESS": self.address,
        }

    def __enter__(self) -> FakeCluster:
        config = yaml.safe_load(CLUSTER.read_text())
        cluster = self.folder / "cluster.yaml"
        cluster.write_text(yaml.safe_dump(fake_form(config, self.address, self._idle_minutes)))
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        environment, command = head_command(config, *self._options(config, cluster))
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command[1:]],
            env={**os.environ, **self._own_environment(), **environment},
            stdout=(self.folder / "head.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _options(self, config: dict[str, Any], cluster: Path) -> list[str]:
        head = config["available_node_types"][HEAD_TYPE]["resources"]
        return [
            f"--port={self.address.split(':')[1]}",
            f"--autoscaling-config={cluster}",
            f"--temp-dir={self.folder / 'ray'}",
            f"--num-cpus={head['CPU']}",
            f"--num-gpus={head['GPU']}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--dashboard-port={self.dashboard.split(':')[-1]}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
            "--block",
        ]

    def _own_environment(self) -> dict[str, str]:
        key, value = self._mark.split("=")
        return {
            key: value,
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # What `ray up` gives a head, so that the same autoscaler runs.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        }

    def _wait(self) -> None:
        for _ in range(600):
            if self._process.poll() is not None:
                break
            if "Ray runtime started" in self.log():
                return
            time.sleep(0.1)
        raise RuntimeError(f"no head on {self.address}:\n{self.log()[-3000:]}")

    def log(self) -> str:
        """What the head's start command has printed."""
        return (self.folder / "head.log").read_text()

    def pids(self) -> list[int]:
        """Every process of this cluster, those that detached themselves included."""
        everyone = (int(name) for name in os.listdir("/proc") if name.isdigit())
        return [pid for pid in everyone if self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            return False

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            for _attempt in range(30):
                self._process.poll()
                if not self.pids():
                    break
                time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Runs until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=6399, help="of the head's GCS")
    parser.add_argument("--idle-minutes", type=float, default=0.5, help="until a node goes")
    args = parser.parse_args()
    with FakeCluster(args.port, args.idle_minutes) as cluster:
        print("running; in another shell:")
        print("  export " + " ".join(f"{k}={v}" for k, v in cluster.environment.items()))
        print(f"  {Path(sys.executable).with_name('ray')} status    dashboard: {cluster.dashboard}")
        print("Ctrl-C ends it", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")


if __name__ == "__main__":
    main()
