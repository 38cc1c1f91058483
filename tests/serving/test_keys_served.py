"""Keys before the real engine, on Ray too: caches apart, the page, OpenAI's client."""

import asyncio
import shutil
import time

import httpx
import openai
import pytest
import uvicorn
import yaml
from prometheus_client import CollectorRegistry

from serving.app import build_app
from serving.following import Bulletin
from serving.keys import hash_of, new_key
from serving.metrics import Metrics
from serving.registry import Registry
from serving.server import http_config
from serving.settings import DEMO
from tests.pictures import data_url, noise
from tests.serving.test_page import FLAGS, wait_for_answer

ON_RAY = pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.long])
SECRETS = {name: new_key() for name in ("alice", "bob", "ops", "narrow")}
WORDS = "a long enough story for whole blocks of the prefix cache, told to every key alike. " * 4


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    special = {"ops": {"admin": True}, "narrow": {"adapters": ["sentiment"]}}
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entries = [
        {"name": name, "sha256": hash_of(secret), **special.get(name, {})}
        for name, secret in SECRETS.items()
    ]
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture(scope="module")
def in_process(demo_server, keys_file):
    """The demo's engine behind an app that asks for keys; yields its URL."""
    labeler = demo_server.labeler
    settings = demo_server.settings.model_copy(update={"keys": keys_file})

    async def start():
        app = build_app(
            labeler,
            settings,
            Metrics(CollectorRegistry()),
            bulletin=Bulletin(labeler.catalogue),
            adapters=Registry(None, check=None),
        )
        server = uvicorn.Server(http_config(app, settings))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        return server, task

    async def stop(server, task):
        server.should_exit = True
        await task

    server, task = demo_server.call(start())
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    demo_server.call(stop(server, task))


@pytest.fixture(scope="module")
def on_ray(keys_file, tmp_path_factory):
    from tests.ray_running import RayServer

    folder = tmp_path_factory.mktemp("ray")
    adapters = shutil.copytree(DEMO / "adapters", folder / "adapters")
    settings = {"log_format": "json", "log_level": "info", "keys": str(keys_file)}
    with RayServer(folder / "log", dtype="float32", adapters=str(adapters), **settings) as server:
        yield server


@pytest.fixture(params=["in_process", ON_RAY])
def url(request):
    if request.param == "in_process":
        return request.getfixturevalue("in_process")
    return request.getfixturevalue("on_ray").url


def ask(url, name, method, path, **more):
    headers = {"authorization": f"Bearer {SECRETS[name]}"} if name else {}
    return httpx.request(method, f"{url}{path}", headers=headers, timeout=120, **more)


def client_of(url, key):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_equal_posts_of_two_keys_share_no_prefix_and_answer_the_same(url):
    body = {"image": data_url(noise(61)), "text": WORDS, "retention_ratio": 0.4}

    def label(name):
        answer = ask(url, name, "POST", "/v1/label", json=body)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], answer.json()["probabilities"]

    cached, answers = zip(*map(label, ["alice", "alice", "bob", "bob", "alice"]), strict=True)
    assert (cached[0], cached[2]) == (0, 0)
    assert min(cached[1], cached[3], cached[4]) > 0
    for each in answers[1:]:
        assert each["sentiment"] == pytest.approx(answers[0]["sentiment"], abs=1e-4)


@pytest.mark.parametrize("has_image", [False, True])
def test_equal_chats_of_two_keys_share_no_prefix(url, has_image):
    content = [{"type": "text", "text": f"{has_image} {WORDS}"}]
    if has_image:
        content.append({"type": "image_url", "image_url": {"url": data_url(noise(62))}})

    def chat(name):
        messages = [{"role": "user", "content": content}]
        with client_of(url, SECRETS[name]) as client:
            answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=2)
        details = answer.usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    cached = [chat(name) for name in ("alice", "alice", "bob", "bob")]
    assert (cached[0], cached[2]) == (0, 0), cached
    assert min(cached[1], cached[3]) > 0, cached


def test_openais_client_sees_our_refusals_as_its_own_errors(url):
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with client_of(url, new_key()) as client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    with client_of(url, SECRETS["narrow"]) as client:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.chat.completions.create(model="llavac", **talk)
        assert refused.value.code == "adapter_not_allowed"
        assert [model.id for model in client.models.list()] == ["sentiment"]
        assert client.chat.completions.create(model="sentiment", **talk).choices


@pytest.mark.ray
@pytest.mark.long
def test_only_an_admin_changes_adapters_and_reads_metrics(on_ray):
    for name, status in ((None, 401), ("alice", 403)):
        assert ask(on_ray.url, name, "DELETE", "/v1/adapters/sentiment").status_code == status
        assert ask(on_ray.url, name, "GET", "/metrics").status_code == status
        body = {"name": "sentiment"}
        assert ask(on_ray.url, name, "POST", "/v1/adapters", json=body).status_code == status
    assert ask(on_ray.url, None, "GET", "/readyz").status_code == 200
    assert b"sieve_requests" in ask(on_ray.url, "ops", "GET", "/metrics").content
    removed = ask(on_ray.url, "ops", "DELETE", "/v1/adapters/sentiment")
    assert removed.status_code == 200, removed.text
    label = {"text": "x", "model": "sentiment"}
    assert ask(on_ray.url, "alice", "POST", "/v1/label", json=label).status_code == 404
    added = ask(on_ray.url, "ops", "POST", "/v1/adapters", json={"name": "sentiment"})
    assert added.status_code == 200, added.text
    assert ask(on_ray.url, "alice", "POST", "/v1/label", json=label).status_code == 200
    check_log(on_ray)


def check_log(server):
    """Who changed what stands there, once Ray has brought it; no key does."""
    deadline = time.monotonic() + 30
    while len(changes := [line for line in server.log_objects() if "adapter" in line]) < 2:
        assert time.monotonic() < deadline, changes
        time.sleep(0.5)
    said = [(line["logger"], line["what"], line["key"]) for line in changes]
    assert said == [("sieve.audit", f"adapter_{done}", "ops") for done in ("removed", "added")]
    lines = [line for line in server.log_objects() if line.get("path") == "/v1/label"]
    assert {line.get("key") for line in lines} >= {"alice"}
    text = server.log_text()
    for secret in SECRETS.values():
        assert secret not in text
        assert hash_of(secret) not in text


@pytest.mark.browser
def test_the_page_says_that_it_needs_a_key_and_works_with_one(in_process):
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page()
        page.goto(in_process)
        page.wait_for_selector("#server.failed")
        assert "a key is needed" in page.locator("#server").text_content()
        page.get_by_label("API key").fill(new_key())
        page.get_by_label("API key").press("Enter")
        page.get_by_text("this server does not know the key").wait_for()
        page.get_by_label("API key").fill(SECRETS["narrow"])
        page.get_by_label("API key").press("Enter")
        page.wait_for_selector(".panel")
        page.locator("#examples button").first.click()
        wait_for_answer(page)
        assert page.locator("#server").text_content().startswith("1 adapter, ")
        assert SECRETS["narrow"] not in page.content()
        browser.close()
