"""`python -m serving --ray` at SIGTERM, with engines that only wait: what its clients see."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")
from tests.running import free_port

ROOT = Path(__file__).resolve().parents[2]
SERVICE_S = 2.0
SCRIPT = """\
import sys, uvloop
from serving.cluster import home
from serving.cluster.settings import RayAppSettings
from serving.ray_app import build
home.app = lambda settings: build(settings, "bench.stub_engine:StubEngine")
settings = RayAppSettings(
    port=int(sys.argv[1]), ray_cpus=8, replicas="2", max_ongoing=2, drain_s=60
)
uvloop.run(home.serve_on_ray(settings))
"""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class Home:
    """The real home in a process of its own, with stub engines."""

    def __init__(self, folder):
        port, self._log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{port}"
        environment = {"PYTHONPATH": str(ROOT), "STUB_SERVICE_MS": str(1000 * SERVICE_S)}
        environment |= {"RAY_AUTH_MODE": "disabled"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(port)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    @property
    def log(self):
        return self._log.read_text()[-3000:]

    def until_ready(self):
        deadline = time.monotonic() + 240
        while True:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            try:
                if httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    try:
        home.until_ready()
        yield home
    finally:
        if home.process.poll() is None:
            for _ in range(2):
                home.process.send_signal(signal.SIGTERM)
                time.sleep(1)
            home.process.wait(timeout=120)


def label(client, number):
    return client.post("/v1/label", json={"text": f"post {number}", "model": "demo"})


def test_sigterm_answers_what_waits_and_the_stream_refuses_the_rest_and_ends(home):
    ask = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": True}
    lines, started = [], threading.Event()

    def stream(client):
        with client.stream("POST", "/v1/chat/completions", json=ask) as answer:
            for line in answer.iter_lines():
                started.set()
                lines.append(line)

    limits = httpx.Limits(max_connections=50)
    with (
        httpx.Client(base_url=home.url, timeout=120, limits=limits) as client,
        httpx.Client(base_url=home.url, timeout=120) as kept,
        ThreadPoolExecutor(20) as pool,
    ):
        assert kept.get("/healthz").status_code == 200
        # Two engines take two each: others wait at the HTTP side for an engine.
        accepted = [pool.submit(label, client, number) for number in range(9)]
        streaming = pool.submit(stream, client)
        assert started.wait(60)
        home.process.send_signal(signal.SIGTERM)
        ready = kept.get("/readyz")
        while ready.status_code == 200:
            assert home.process.poll() is None, home.log
            ready = kept.get("/readyz")
        refused = label(kept, 100)
        for answer in (ready, refused):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "draining"
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers.get("connection") == "close"
        assert kept.get("/healthz").status_code == 200
        assert [each.result().status_code for each in accepted] == [200] * len(accepted)
        streaming.result()
    assert lines[-2] == "data: [DONE]"
    assert not any("error" in json.loads(x[6:]) for x in lines if x.startswith("data: {"))
    assert home.process.wait(timeout=120) == 0, home.log


def test_a_second_signal_does_not_wait(home):
    with ThreadPoolExecutor(20) as pool, httpx.Client(base_url=home.url, timeout=120) as client:
        asked = [pool.submit(label, client, number) for number in range(20)]
        time.sleep(SERVICE_S / 2)
        home.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        home.process.send_signal(signal.SIGTERM)
        home.process.wait(timeout=60)
        errors = [each.exception() for each in asked]
    assert any(errors) or any(each.result().status_code != 200 for each in asked)
