"""ray_cluster.yaml and serving/serve.yaml at work, on one machine (setup/fake_cluster.py)."""

import concurrent.futures
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.setup_files import load

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.ray, pytest.mark.long]


class Deployed:
    """The fake cluster, and the stub that its Serve config puts there."""

    def __init__(self, cluster, port, folder):
        self.cluster, self.folder = cluster, folder
        self.url = f"http://127.0.0.1:{port}"
        self.config = yaml.safe_load((ROOT / "serving" / "serve.yaml").read_text())
        self.config["http_options"]["port"] = port
        self.config["applications"][0]["import_path"] = "tests.serving.cluster_stub:app"

    def run(self, *command, **environment):
        return subprocess.run(
            [BIN / command[0], *command[1:]],
            env={**os.environ, **self.cluster.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def deploy(self, **args):
        self.config["applications"][0]["args"].update(args)
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self.config))
        result = self.run("serve", "deploy", path, "--address", f"http://{self.cluster.dashboard}")
        assert result.returncode == 0, result.stderr

    def status(self):
        token = {"authorization": f"Bearer {self.token}"}
        url = f"http://{self.cluster.dashboard}/api/serve/applications/"
        return httpx.get(url, headers=token, timeout=30).json()["applications"]["sieve"]

    @property
    def token(self):
        return Path(self.cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def ask(self, seconds):
        answer = httpx.get(self.url, params={"seconds": seconds}, timeout=120)
        answer.raise_for_status()
        return answer.json()

    def ask_many(self, count, seconds):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(self.ask, [seconds] * count))

    def num_workers(self):
        text = self.run("ray", "status").stdout
        active = text.split("Pending:")[0]
        return sum(int(n) for n in re.findall(r"(\d+) ray\.worker\.gpu", active))


def wait_until(condition, timeout=90):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    module = load("fake_cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with module.FakeCluster(idle_minutes=0.1) as cluster:
            deployed = Deployed(cluster, module.free_port(), tmp_path_factory.mktemp("serve"))
            yield deployed
    assert cluster.pids() == []


def test_without_the_token_no_door_opens(deployed):
    url = f"http://{deployed.cluster.dashboard}/api/version"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"authorization": "Bearer guess"}).status_code == 403
    assert httpx.get(url, headers={"authorization": f"Bearer {deployed.token}"}).status_code == 200
    code = "import ray; ray.init(logging_level='error')"
    assert deployed.run("python", "-c", code).returncode == 0
    refused = deployed.run("python", "-c", code, RAY_AUTH_TOKEN="guess")
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr, refused.stderr[-2000:]


@pytest.mark.parametrize("door", ["dashboard", "api"])
def test_dashboard_and_api_listen_on_loopback_only(deployed, door):
    deployed.deploy()
    url = {"dashboard": deployed.cluster.dashboard, "api": deployed.url}[door]
    port = int(url.rsplit(":", 1)[1])
    wait_until(lambda: listeners(port))
    assert listeners(port) == {"0100007F"}


def listeners(port):
    """Addresses, as the kernel writes them, on which someone listens."""
    rows = [
        line.split()[1:4]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    local = [address.split(":") for address, _, state in rows if state == "0A"]
    return {host for host, number in local if int(number, 16) == port}


def test_requests_bring_replicas_and_nodes_and_both_go_when_none_come(deployed):
    deployed.deploy()
    wait_until(lambda: deployed.status()["status"] == "RUNNING")
    assert deployed.num_workers() == 0
    first = deployed.ask(0.1)
    assert deployed.num_workers() == 1
    answers = deployed.ask_many(24, 5)
    assert len({answer["node"] for answer in [first, *answers]}) == 3
    assert deployed.num_workers() == 3
    wait_until(lambda: deployed.num_workers() == 0)


def test_deploying_a_changed_file_loses_no_request_and_holds_none_up(deployed):
    deployed.deploy(model="old")
    wait_until(lambda: deployed.status()["status"] == "RUNNING")
    deployed.ask(0.1)
    stop, answers, failures = threading.Event(), [], []

    def client():
        while not stop.is_set():
            start = time.monotonic()
            try:
                answers.append((deployed.ask(0.5)["model"], time.monotonic() - start))
            except httpx.HTTPError as error:
                failures.append(error)

    def newest():
        return {model for model, _ in answers[-20:]}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(client)
        try:
            wait_until(lambda: len(answers) > 20)
            assert newest() == {"old"}
            deployed.deploy(model="new")
            wait_until(lambda: newest() == {"new"})
        finally:
            stop.set()
    assert failures == []
    assert max(seconds for _, seconds in answers) < 4  # a new engine takes longer to start
