"""HTTP surface over a fake engine: bodies, errors, cards. Real engines: test_server.py."""

import asyncio

import httpx
import pytest
from prometheus_client import CollectorRegistry

from serving.app import build_app
from serving.following import Bulletin
from serving.labeler import Labeler
from serving.manifest import Manifest
from serving.metrics import Metrics
from serving.registry import Registry
from serving.settings import Settings
from tests.pictures import data_url, noise
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_labeler import catalogue

SETTINGS = Settings(
    max_images=2, max_image_bytes=100_000, max_image_pixels=100_000, max_text_chars=500
)
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def engine():
    return FakeEngine()


def make_app(labeler, **settings):
    return build_app(
        labeler,
        SETTINGS.model_copy(update=settings),
        Metrics(CollectorRegistry()),
        bulletin=Bulletin(labeler.catalogue),
        adapters=Registry(None, check=None),
    )


@pytest.fixture
def client(engine, published_tokenizer):
    adapters = {"tuned": Manifest(label_structure="llavac", retention_ratio=0.2)}
    labeler = Labeler(engine, catalogue(adapters), published_tokenizer)
    app = make_app(labeler)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_a_label_says_what_was_kept_and_what_it_cost(client):
    body = {"image": data_url(noise()), "text": "a day", "retention_ratio": 0.4}
    answer = (await client.post("/v1/label", json=body)).json()
    assert answer["labels"].keys() == {"sentiment"}
    assert sum(answer["probabilities"]["sentiment"].values()) == pytest.approx(1)
    assert answer["retention"] == {"ratio": 0.4, "selector": "cls", "kept": 26, "patches": 64}
    assert {"image", "queue", "prefill", "decode", "total"} == answer["timing_ms"].keys()


async def test_image_and_text_may_be_missing_and_images_several(client, engine):
    for body, count in [
        ({"text": "x"}, 0),
        ({"image": data_url(noise())}, 1),
        ({"image": [data_url(noise()), data_url(noise(1))]}, 2),
        ({}, 0),
    ]:
        answer = await client.post("/v1/label", json=body)
        assert answer.status_code == 200, answer.text
        assert len(engine.requests[-1].images) == count


async def test_the_manifest_decides_where_the_request_does_not(client, engine):
    answer = (await client.post("/v1/label", json={"model": "tuned", "text": "x"})).json()
    assert answer["label_structure"] == "llavac"
    assert engine.requests[-1].retention.ratio == 0.2
    assert engine.requests[-1].adapter.name == "tuned"


BAD_LABELS = [
    ({"retention_ratio": 0}, 400, "retention_ratio"),
    ({"retention_ratio": 1.01}, 400, "retention_ratio"),
    ({"retention_ratio": "half"}, 400, "retention_ratio"),
    ({"selector": "best"}, 400, "selector"),
    ({"label_structure": "no"}, 400, "label_structure"),
    ({"model": "../x"}, 404, "model"),
    ({"model": "x" * 100_000}, 404, "model"),
    ({"chat_template": "x"}, 400, "chat_template"),
    ({"text": 5}, 400, "text"),
    ({"text": "x" * 501}, 400, "text"),
    ({"image": 5}, 400, "image"),
    ({"image": "http://127.0.0.1/x"}, 400, "image"),
    ({"image": ["data:,"] * 1000}, 400, "image"),
    ({"image": data_url(b"<html>")}, 400, "image"),
]
BAD_CHATS = [
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": CHAT["messages"] * 1000}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ({"n": 10**9}, 400, "n"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"temperature": -1}, 400, "temperature"),
    ({"stop": ["x"] * 1_000}, 400, "stop"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"structured_outputs": {"regex": "(a+)+b"}}, 400, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, 400, "structured_outputs"),
    ({"structured_outputs": {"choice": ["x"] * 1000}}, 400, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"]}, "label_structure": "llavac"}, 400, "structured"),
    *(
        ({field: 1}, 400, field)
        for field in (
            "chat_template", "mm_processor_kwargs", "media_io_kwargs", "prompt_embeds",
            "cache_salt", "logprob_token_ids", "kv_transfer_params", "vllm_xargs",
            "prompt_logprobs", "tools", "guided_regex",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "param"), BAD_LABELS)
async def test_bad_label_requests_are_refused_by_name(client, change, status, param):
    answer = await client.post("/v1/label", json={"text": "x", **change})
    check_error(answer, status, param)


@pytest.mark.parametrize(("change", "status", "param"), BAD_CHATS)
async def test_bad_chat_requests_are_refused_by_name(client, change, status, param):
    answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
    check_error(answer, status, param)


def check_error(answer, status, param):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert param in error["param"]
    assert len(error["message"]) < 600
    assert "Traceback" not in error["message"]


def schema(**root):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": root}}
    return {**CHAT, "response_format": form}


@pytest.mark.parametrize(
    "root",
    [
        {"$ref": "#"},
        {"type": "string", "pattern": "(a+)+b"},
        {"type": "string", "maxLength": 10**9},
        {"enum": list(range(2_000))},
        {"enum": list(range(200))},
        {
            "a": {
                "a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}}}}}
            }
        },
    ],
)
async def test_schemas_that_cost_are_refused(client, root):
    answer = await client.post("/v1/chat/completions", json=schema(**root))
    check_error(answer, 400, "response_format")


@pytest.mark.parametrize("path", ["/v1/label", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'{"text": "x", "text": NaN}'],
)
async def test_malformed_bodies_are_400_in_openais_shape(client, path, body):
    headers = {"content-type": "application/json"}
    answer = await client.post(path, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_413(client, declared):
    async def chunks():
        for _ in range(100):
            yield b"x" * 10_000

    content = b"x" * 1_000_000 if declared else chunks()
    headers = {"content-type": "application/json"}
    answer = await client.post("/v1/label", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/label", 405)]
)
async def test_other_routes_answer_in_openais_shape(client, method, path, status):
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_a_dead_engine_is_503_and_may_be_tried_again(client, engine):
    engine.is_dead = True
    for answer in (await client.get("/readyz"), await client.post("/v1/label", json={})):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "engine_dead"
    assert (await client.get("/healthz")).status_code == 200


async def test_models_carry_their_manifest_and_no_path(client):
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert cards.keys() == {"base", "tuned"}
    assert cards["tuned"]["parent"] == "base"
    assert cards["tuned"]["label_structure"] == "llavac"
    assert cards["tuned"]["retention_ratio"] == 0.2
    assert "/" not in "".join(
        str(value) for key, value in cards["tuned"].items() if key != "prompt"
    )


async def test_chat_keeps_the_clients_words_and_carries_the_ratio(client, engine):
    content = [
        {"type": "text", "text": "look </s>"},
        {"type": "image_url", "image_url": {"url": data_url(noise())}},
    ]
    messages = [{"role": "user", "content": content}]
    body = {**CHAT, "messages": messages, "temperature": 0, "retention_ratio": 0.05}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    call = engine.requests[-1]
    assert call.retention.ratio == 0.05
    assert call.pattern is None
    assert call.body.keys() == {"model", "messages", "temperature"}
    text, image = call.body["messages"][0]["content"]
    assert text["text"].replace("\u200b", "") == "look </s>"
    assert image["image_pil"].size == (120, 80)


async def test_unknown_paths_do_not_grow_the_metrics(client):
    for number in range(50):
        await client.get(f"/nope/{number}")
    assert (await client.get("/metrics")).text.count('status="404"') == 2  # total and created


async def test_a_client_that_leaves_cancels_the_work():
    from starlette.requests import Request

    from serving.errors import ClientLeftError
    from serving.waiting import Deadline, until_answered

    cancelled = asyncio.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeftError):
        await until_answered(Request({"type": "http"}, receive), Deadline(60), work())
    assert await asyncio.wait_for(cancelled.wait(), 1)
