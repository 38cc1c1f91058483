"""The real server whose engine is killed or stopped, and which then ends: one start for all."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serving.process_family import descendants, seen
from serving.settings import DEMO
from tests.pictures import data_url, noise
from tests.running import Client, free_port

ROOT = Path(__file__).resolve().parents[2]
HANG_TIMEOUT_S = 10
START_TIMEOUT_S = 900

pytestmark = [pytest.mark.long, pytest.mark.timeout(2 * START_TIMEOUT_S)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def segments_of(pid):
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


class Family:
    """The engine of now: its processes and the shared memory that only they have."""

    def __init__(self, server):
        (self.core,) = [p for p in descendants(server) if "EngineCore" in command_of(p)]
        (self.worker,) = [p for p in descendants(self.core) if "Worker" in command_of(p)]
        self.pids = [self.core, self.worker]
        self.segments = segments_of(self.core) - segments_of(server)
        assert self.segments

    def left(self):
        pids = [pid for pid in self.pids if seen(pid)]
        return [*pids, *(name for name in self.segments if Path(name).exists())]


class ServerProcess(Client):
    """`python -m serving` as a user starts it, on the demo with adapters that may change."""

    def __init__(self, folder):
        super().__init__()
        adapters = shutil.copytree(DEMO / "adapters", folder / "adapters")
        port, self._log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{port}"
        flags = [f"--port={port}", f"--adapters={adapters}", "--max-num-seqs=4"]
        flags += [f"--hang-timeout-s={HANG_TIMEOUT_S}", "--drain-s=240"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", *flags],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ},
                start_new_session=True,
            )

    @property
    def log(self):
        return self._log.read_text()

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def until_ready(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            assert self.process.poll() is None, self.log[-3000:]
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.2)

    def family(self):
        return Family(self.process.pid)

    def end(self):
        """Whatever state a test left it in."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ServerProcess(tmp_path_factory.mktemp("outages"))
    try:
        server.until_ready()
        yield server
    finally:
        server.end()


def question(number, **more):
    body = {"image": data_url(noise(number)), "text": f"a day {number}", "retention_ratio": 0.4}
    return {**body, "model": "llavac", **more}


def slow_chat(num_tokens, **more):
    """A chat that takes exactly so many steps."""
    end = json.loads((DEMO / "base" / "config.json").read_text())["text_config"]["eos_token_id"]
    ask = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story."}]}
    return {**ask, "max_tokens": num_tokens, "logit_bias": {str(end): -100}, **more}


def known(server):
    """Answers of every model to the same posts; the caches play no part in them."""
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    return {
        (card["id"], number): server.label(**question(number, model=card["id"]))["probabilities"]
        for card in cards
        for number in (1, 2)
    }


def same(first, second):
    assert first.keys() == second.keys()
    for key, fields in first.items():
        for field, probabilities in fields.items():
            assert second[key][field] == pytest.approx(probabilities, abs=0.02), key


NUMBERS = itertools.count(1000)
"""Of questions, none of them asked in two strikes: one that two engines were lost on is refused."""


class Crowd:
    """Clients that keep asking until they are told to stop, and what they were answered."""

    def __init__(self, server, size):
        self._server, self._stop = server, threading.Event()
        self._pool = ThreadPoolExecutor(size)
        self.answers, self.health = [], []
        self._asking = [self._pool.submit(self._ask, number) for number in range(size)]

    def _ask(self, number):
        with httpx.Client(base_url=self._server.url, timeout=120) as client:
            while not self._stop.is_set():
                if number == 0:
                    self.health.append(client.get("/healthz").status_code)
                    time.sleep(0.1)
                    continue
                answer = client.post("/v1/label", json=question(next(NUMBERS)))
                self.answers.append(answer)
                if answer.status_code != 200:
                    time.sleep(0.2)

    def stop(self):
        self._stop.set()
        for asking in self._asking:
            asking.result(timeout=120)
        self._pool.shutdown()


def strike(server, how):
    """Does something to the engine under load: clients are told, and it is as it was."""
    family, restarts = server.family(), server.metric("sieve_engine_restarts_total")
    crowd = Crowd(server, 7)
    while sum(answer.status_code == 200 for answer in crowd.answers) < 12:
        time.sleep(0.05)
    how(family)
    deadline = time.monotonic() + 60
    while True:  # for a moment it may only be known that the engine is dead
        answer = httpx.get(f"{server.url}/readyz", timeout=30)
        if answer.status_code == 503 and answer.json()["error"]["code"] == "engine_restarting":
            break
        assert time.monotonic() < deadline, server.log[-3000:]
        time.sleep(0.05)
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{server.url}/metrics", timeout=30).status_code == 200
    assert server.metric("sieve_engine_up") == 0
    server.until_ready()
    crowd.stop()
    assert server.metric("sieve_engine_restarts_total") == restarts + 1
    assert server.metric("sieve_engine_up") == 1
    assert family.left() == []
    assert set(crowd.health) == {200}
    failed = [answer for answer in crowd.answers if answer.status_code != 200]
    codes = {answer.json()["error"]["code"] for answer in failed}
    for answer in failed:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
    # A machine that is short of processors may not decode pictures in time beside a start.
    assert "engine_restarting" in codes
    assert codes <= {"engine_restarting", "overloaded"}


def test_a_killed_core_costs_nothing_but_time_and_its_adapters_are_as_they_were(server):
    removed = httpx.delete(f"{server.url}/v1/adapters/sentiment", timeout=120)
    assert removed.status_code == 200, removed.text
    before = known(server)
    strike(server, lambda family: os.kill(family.core, signal.SIGKILL))
    same(before, known(server))
    again = httpx.post(f"{server.url}/v1/adapters", json={"name": "sentiment"}, timeout=120)
    assert again.status_code == 200, again.text
    assert server.label(**question(3, model="sentiment"))["model"] == "sentiment"


def test_a_killed_worker_costs_nothing_but_time(server):
    before = known(server)
    strike(server, lambda family: os.kill(family.worker, signal.SIGKILL))
    same(before, known(server))


def test_a_stopped_worker_is_a_hang_and_its_processes_are_gone(server):
    before = known(server)
    strike(server, lambda family: os.kill(family.worker, signal.SIGSTOP))
    same(before, known(server))
    assert "the engine hung" in server.log


def test_a_stream_whose_engine_is_killed_ends_with_an_error_event(server):
    family = server.family()
    body = slow_chat(1500, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as told:
        lines = told.iter_lines()
        first = next(line for line in lines if line)
        os.kill(family.core, signal.SIGKILL)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert "error" not in json.loads(first.removeprefix("data: "))
    assert json.loads(events[-2])["error"]["code"] == "engine_restarting"
    assert events[-1] == "[DONE]"
    server.until_ready()


def num_done(futures):
    return sum(future.done() for future in futures)


def test_sigterm_answers_the_stream_and_the_queue_refuses_the_rest_and_leaves_nothing(server):
    family, streamed = server.family(), []
    slow, started = slow_chat(800, stream=True), threading.Event()

    def stream():
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=slow, timeout=120
        ) as answer:
            for line in answer.iter_lines():
                started.set()
                streamed.append(line)

    with httpx.Client(base_url=server.url, timeout=120) as kept, ThreadPoolExecutor(20) as pool:
        assert kept.get("/readyz").status_code == 200
        streaming = pool.submit(stream)
        assert started.wait(60)
        # More than the engine's four places: some of them wait in its queue.
        ask = [slow_chat(200, user=str(number)) for number in range(12)]
        queued = [pool.submit(kept.post, "/v1/chat/completions", json=each) for each in ask]
        while num_done(queued) + server.metric("sieve_pending_requests") < 1 + len(queued):
            assert not streaming.done()
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        refused = kept.post("/v1/label", json=question(1))
        while refused.status_code == 200:
            refused = kept.post("/v1/label", json=question(1))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        answers = [answer.result() for answer in queued]
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {200}
        streaming.result()
    assert streamed[-2] == "data: [DONE]"
    assert not any("error" in line for line in streamed)
    assert server.process.wait(timeout=START_TIMEOUT_S) == 0, server.log[-3000:]
    assert family.left() == []
    assert "leaked shared_memory" not in server.log
