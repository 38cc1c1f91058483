"""The app against its own OpenAPI document: no 5xx, errors in OpenAI's shape, whatever is sent."""

import asyncio
import contextlib
import threading

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from bench.bad_requests import BASE
from bench.fuzz import fault_of, fuzz_bodies
from bench.stub_app import stub_app
from serving.server import http_config
from serving.settings import Settings
from tests.running import RunningServer

ROUTES = {
    ("POST", "/v1/label"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/{name}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
}


@contextlib.contextmanager
def stub_server():
    """The app over a stub engine, behind the real HTTP server, with its document."""
    started, stopping, found = threading.Event(), threading.Event(), []

    async def serve():
        given = Settings(model_name=BASE, image_workers=0, docs=True, port=0)
        async with stub_app(given) as app:
            server = uvicorn.Server(http_config(app, given))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            found.append(server.servers[0].sockets[0].getsockname()[1])
            started.set()
            await asyncio.to_thread(stopping.wait)
            server.should_exit = True
            await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{found[0]}"
    stopping.set()
    thread.join(30)


@contextlib.contextmanager
def real_server():
    """The demo, served as users serve it."""
    with RunningServer(docs=True) as server:
        yield server.url


@pytest.fixture(
    scope="module", params=[stub_server, pytest.param(real_server, marks=pytest.mark.long)]
)
def url(request):
    """Of a server with its document."""
    with request.param() as url:
        yield url


@pytest.fixture(scope="module")
def document(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_names_every_route_and_no_other(document):
    operations = [result.ok() for result in document.get_all_operations()]
    named = {(each.method.upper(), each.path) for each in operations}
    assert {route for route in named if route[1].startswith(("/v1", "/h", "/r", "/m"))} == ROUTES


CASES = [
    (route, mode)
    for route in sorted(ROUTES)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or route[0] == "POST"  # nothing of others can be wrong
]


@pytest.mark.parametrize(("route", "mode"), CASES)
def test_no_generated_request_is_a_server_error(document, route, mode):
    method, path = route
    statuses = []

    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        answer = case.call()
        statuses.append(answer.status_code)
        assert not fault_of(answer), case.as_curl_command()

    check()
    assert statuses
    assert method != "GET" or set(statuses) == {200}


def test_damaged_bodies_are_answered_or_refused(url):
    counts, failures = asyncio.run(fuzz_bodies(0, seconds=300, most=300, server=url))
    assert not failures
    assert sum(found.total() for found in counts.values()) == 300
