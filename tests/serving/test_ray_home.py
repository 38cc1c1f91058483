"""The Ray home with engines that only wait: routing, bounds, deadlines, leavers. One Ray start."""

import asyncio
import os
import shutil
import time
from collections import Counter

import httpx
import pytest

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402

from bench.stub_engine import SERVICE_MS  # noqa: E402
from serving.cluster.settings import RayAppSettings  # noqa: E402
from serving.ray_app import NAME, build  # noqa: E402
from serving.settings import DEMO  # noqa: E402
from tests.running import free_port  # noqa: E402

REPLICAS, PLACES, PENDING = 3, 4, 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """URL of three stub engines, four places each, forty requests pending at most."""
    folder = tmp_path_factory.mktemp("home") / "adapters"
    shutil.copytree(DEMO / "adapters", folder)
    settings = RayAppSettings(
        adapters=str(folder),
        replicas=str(REPLICAS),
        replica_cpus=0.1,
        max_ongoing=PLACES,
        max_pending=PENDING,
        port=free_port(),
    )
    root = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAME,
            runtime_env={"env_vars": {SERVICE_MS: "300", "PYTHONPATH": root}},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
            serve.run(build(settings, "bench.stub_engine:StubEngine"), name=NAME)
            yield f"http://127.0.0.1:{settings.port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def client(url):
    limits = httpx.Limits(max_connections=500)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits)


def served(url):
    """Labelled posts so far, by engine."""
    from prometheus_client.parser import text_string_to_metric_families

    time.sleep(2.5)  # engines push their metrics every second
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return Counter(
        {
            sample.labels["replica"]: int(sample.value)
            for family in families
            for sample in family.samples
            if sample.name == "sieve_queue_wait_seconds_count"
        }
    )


async def ask(http, number=0, **body):
    return await http.post("/v1/label", json={"text": f"post {number}", **body})


async def test_a_hot_adapter_spreads_over_all_engines_and_a_cool_one_stays(home):
    async with client(home) as http:
        before = served(home)
        for number in range(6):
            assert (await ask(http, number, model="sentiment")).status_code == 200
        cool = served(home) - before
        assert len(cool) == 1, cool  # one at a time: where it is warm
        before = served(home)
        answers = await asyncio.gather(*(ask(http, i, model="llavac") for i in range(36)))
        assert {answer.status_code for answer in answers} == {200}
        hot = served(home) - before
    assert len(hot) == REPLICAS, hot
    assert min(hot.values()) >= 36 / REPLICAS / 2, hot


async def test_more_than_may_wait_get_429_in_openais_shape_with_a_time(home):
    async with client(home) as http:
        answers = await asyncio.gather(*(ask(http, i) for i in range(2 * PENDING)))
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() == {200, 429}, counts
    assert counts[200] >= PENDING
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error"
    async with client(home) as http:
        assert (await ask(http)).status_code == 200


async def test_a_deadline_is_a_503_and_frees_its_place(home):
    async with client(home) as http:
        late = await asyncio.gather(*(ask(http, i, timeout_s=0.1) for i in range(12)))
        assert {answer.status_code for answer in late} == {503}
        assert late[0].json()["error"]["code"] == "deadline_exceeded"
        started = time.monotonic()
        answers = await asyncio.gather(*(ask(http, i) for i in range(REPLICAS * PLACES)))
        assert {answer.status_code for answer in answers} == {200}
        assert time.monotonic() - started < 3  # not after 300 ms for each of those given up


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_frees_its_place_within_two_seconds(home, is_stream):
    chat = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": is_stream}

    async def leave():
        async with (
            client(home) as http,
            asyncio.timeout(0.2),
            http.stream("POST", "/v1/chat/completions", json=chat) as response,
        ):
            async for _ in response.aiter_lines():
                pass

    gone = await asyncio.gather(*(leave() for _ in range(12)), return_exceptions=True)
    assert any(isinstance(result, TimeoutError) for result in gone)
    async with client(home) as http:
        async with asyncio.timeout(2):
            while await pending(http):
                await asyncio.sleep(0.1)


async def pending(http):
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("sieve_pending_requests{")
    )


async def test_streams_come_through_whole(home):
    chat = {"model": "llavac", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with client(home) as http, http.stream("POST", "/v1/chat/completions", json=chat) as got:
        events = [line async for line in got.aiter_lines() if line]
    assert len(events) == 11
    assert events[-1] == "data: [DONE]"


async def test_requests_keep_the_id_their_client_gave(home):
    async with client(home) as http:
        answer = await http.get("/healthz", headers={"X-Request-Id": "mine-1"})
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
        assert (await http.get("/readyz")).json() == {"status": "ready"}


async def test_adapters_come_and_go_over_http(home):
    async with client(home) as http:
        assert (await http.delete("/v1/adapters/sentiment")).status_code == 200
        assert (await ask(http, model="sentiment")).status_code == 404
        answer = await http.post("/v1/adapters", json={"name": "sentiment"})
        assert (answer.status_code, answer.json()["engines"]) == (200, REPLICAS)
        assert (await ask(http, model="sentiment")).status_code == 200
