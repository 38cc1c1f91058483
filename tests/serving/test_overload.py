"""More than can be served: who is let in is served in time, who is not hears when to come again."""

import asyncio
import itertools
import json
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from serving.admission import BodyRoom
from serving.app import build_app
from serving.engine_queue import EngineQueue, persistently
from serving.errors import FailedOnceError, OverloadedError
from serving.following import Bulletin
from serving.images import ImageDecoder, ImageLimits
from serving.labeler import Labeler
from serving.metrics import Metrics
from serving.pace import Pace, retry_after
from serving.registry import Registry
from serving.settings import Settings
from serving.streams import begun_stream
from serving.waiting import Turnstile
from tests.pictures import data_url, noise
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_labeler import catalogue


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def gauge():
    return Gauge("test_pending", "", registry=CollectorRegistry())


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(Pace.__init__, "__defaults__", (clock,))
    return clock


def serve(turnstile, clock, count, each_s):
    """So many requests at once, answered one after the other."""
    passages = [turnstile.passage() for _ in range(count)]
    for passage in passages:
        passage.__enter__()
    for passage in passages:
        clock.now += each_s
        passage.__exit__(None, None, None)


def enter(turnstile, count):
    """So many requests that stay inside until the stack is closed."""
    inside = ExitStack()
    for _ in range(count):
        inside.enter_context(turnstile.stay())
    return inside


@pytest.mark.parametrize("each_s", [0.01, 0.5, 4.0])
def test_a_pace_is_that_of_busy_time(each_s):
    clock = Clock()
    pace = Pace(clock)
    for _ in range(3):
        clock.now += 1000  # idle
        pace.tick(was_busy=False)
        for _ in range(400):
            clock.now += each_s
            pace.tick(was_busy=True, done=2)
    assert pace.seconds_for(10) == pytest.approx(5 * each_s, rel=0.05)


def test_an_unknown_pace_says_so_and_forgets_what_is_long_ago():
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_for(5) is None
    for each_s in (1.0, 0.1):
        for _ in range(1000):
            clock.now += each_s
            pace.tick(was_busy=True, done=1)
    assert pace.per_s == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "whole"), [(0, 1), (0.2, 1), (1.2, 2), (59.5, 60), (10**9, 300)]
)
def test_retry_after_is_whole_seconds_within_reason(seconds, whole):
    assert retry_after(seconds) == whole


def test_a_full_turnstile_says_when_half_will_have_left(clock):
    turnstile = Turnstile(20, gauge())
    serve(turnstile, clock, 20, each_s=2.0)
    inside = enter(turnstile, 20)
    with pytest.raises(OverloadedError, match="20 requests are pending, allowed are 20") as caught:
        turnstile.check()
    assert caught.value.status == 429
    assert 18 <= caught.value.retry_after_s <= 24
    inside.close()
    turnstile.check()


def test_who_would_wait_beyond_patience_or_an_own_deadline_is_not_let_in(clock):
    turnstile = Turnstile(1000, gauge(), at_once=2, patience_s=30)
    serve(turnstile, clock, 40, each_s=1.0)
    with enter(turnstile, 27):
        turnstile.check()
        with pytest.raises(OverloadedError, match="would wait") as caught:
            turnstile.check(deadline_s=5)
        assert caught.value.status == 503
        with enter(turnstile, 4), pytest.raises(OverloadedError, match="would wait"):
            turnstile.check()


def test_slow_answers_one_at_a_time_close_no_turnstile(clock):
    turnstile = Turnstile(1000, gauge(), at_once=2, patience_s=5)
    for _ in range(20):
        serve(turnstile, clock, 1, each_s=60)
        clock.now += 600
    with enter(turnstile, 2):
        turnstile.check()


def test_bodies_have_so_much_room_together_but_one_always_fits():
    room = BodyRoom(100, gauge())
    room.take(500)
    for refused in (room.check, room.take):
        with pytest.raises(OverloadedError, match="bodies of 500 bytes") as caught:
            refused(1)
        assert caught.value.retry_after_s >= 1
    room.give_back(500)
    room.take(60)
    room.take(40)


class CountedDecoder(ImageDecoder):
    """The real one; counts, and can be held back."""

    def __init__(self):
        super().__init__(ImageLimits(max_images=2, max_bytes=100_000))
        self.num_decoded = 0
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def decode(self, raws, param="image"):
        self.num_decoded += len(raws)
        await self.may_go.wait()
        return await super().decode(raws, param)


@pytest.fixture
def decoder():
    decoder = CountedDecoder()
    yield decoder
    decoder.close()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def client(engine, decoder, published_tokenizer):
    settings = Settings(
        max_images=2, max_image_bytes=100_000, max_text_chars=500, max_pending=3,
        max_pending_bytes=200_000,
    )  # fmt: skip
    labeler = Labeler(engine, catalogue(), published_tokenizer)
    app = build_app(
        labeler,
        settings,
        Metrics(CollectorRegistry()),
        bulletin=Bulletin(labeler.catalogue),
        adapters=Registry(None, check=None),
        decoder=decoder,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


IMAGE = data_url(noise())
PART = {"type": "image_url", "image_url": {"url": IMAGE}}
CHAT = {"model": "base", "messages": [{"role": "user", "content": [PART]}]}
REFUSED = [
    ("/v1/label", {"image": IMAGE, "nope": 1}),
    ("/v1/label", {"image": IMAGE, "model": "nope"}),
    ("/v1/label", {"image": IMAGE, "label_structure": "nope"}),
    ("/v1/label", {"image": IMAGE, "selector": "nope"}),
    ("/v1/label", {"image": IMAGE, "retention_ratio": 2}),
    ("/v1/label", {"image": IMAGE, "cascade": [1.0, 0.2], "confidence": 0.5}),
    ("/v1/label", {"image": IMAGE, "text": "x" * 501}),
    ("/v1/label", {"image": [IMAGE] * 3}),
    ("/v1/label", {"image": [IMAGE, "data:image/png;base64,!"]}),
    ("/v1/label", {"image": [IMAGE, "file:///etc/passwd"]}),
    ("/v1/chat/completions", {**CHAT, "model": "nope"}),
    ("/v1/chat/completions", {**CHAT, "label_structure": "nope"}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 10**9}),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"99999999": 1}}),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"choice": [" "]}}),
    ("/v1/chat/completions", {**CHAT, "messages": [*CHAT["messages"] * 3]}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED)
async def test_what_can_be_refused_is_refused_before_an_image_is_decoded(
    client, decoder, path, body
):
    answer = await client.post(path, json=body)
    assert answer.status_code in (400, 404), answer.text
    assert decoder.num_decoded == 0


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_body_is_not_read_once_the_server_is_full(client, decoder):
    decoder.may_go.clear()
    inside = [asyncio.create_task(client.post("/v1/label", json={"text": "x"})) for _ in range(3)]
    await until(lambda: decoder.num_decoded == 0 and all(not task.done() for task in inside))
    await asyncio.sleep(0.05)

    async def content():
        raise AssertionError("this body is not to be read")
        yield b""

    headers = {"content-type": "application/json"}
    for path in ("/v1/label", "/v1/chat/completions"):
        answer = await client.post(path, content=content(), headers=headers)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
    for path in ("/healthz", "/readyz", "/v1/models"):
        assert (await client.get(path)).status_code == 200
    decoder.may_go.set()
    assert [(await task).status_code for task in inside] == [200] * 3


@pytest.mark.parametrize("is_declared", [True, False])
async def test_bodies_beyond_the_room_are_a_503_until_there_is_room(client, decoder, is_declared):
    decoder.may_go.clear()
    big = {"image": data_url(b"\0" * 90_000)}
    inside = asyncio.create_task(client.post("/v1/label", json=big))
    await until(lambda: decoder.num_decoded == 1)
    body = json.dumps(big).encode()

    async def content():
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    async def send():
        sent = body if is_declared else content()
        headers = {"content-type": "application/json"}
        return await client.post("/v1/label", content=sent, headers=headers)

    refused = await send()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    decoder.may_go.set()
    assert (await inside).status_code == 400  # it is no image
    assert (await send()).status_code == 400
    assert 'sieve_pending_bytes 0.0' in (await client.get("/metrics")).text  # fmt: skip


async def test_a_client_with_little_time_is_not_kept_waiting_for_its_images(client, decoder):
    decoder.may_go.clear()
    body = {"image": IMAGE, "timeout_s": 0.05}
    for path, sent in [("/v1/label", body), ("/v1/chat/completions", {**CHAT, "timeout_s": 0.05})]:
        answer = await client.post(path, json=sent)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "deadline_exceeded"


async def test_a_further_pass_waits_for_the_queue_where_a_new_request_is_refused():
    answers = [OverloadedError("full"), OverloadedError("full"), "answer"]

    async def ask():
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    left = [*answers]
    with pytest.raises(OverloadedError):
        await persistently(ask, waits=False)
    left = [*answers]
    assert await persistently(ask, waits=True) == "answer"
    left = [FailedOnceError("once"), "answer"]
    assert await persistently(ask, waits=False) == "answer"
    left = [FailedOnceError("once"), FailedOnceError("twice"), "answer"]
    with pytest.raises(FailedOnceError, match="twice"):
        await persistently(ask, waits=True)


OPENING = 'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'


async def test_a_stream_that_fails_at_once_is_an_error_and_closed_whatever_happens():
    closed = 0

    async def events(first):
        nonlocal closed
        try:
            for event in (OPENING, first, "data: {}\n\n", "data: [DONE]\n\n"):
                yield event
        finally:
            closed += 1

    def failure(code, message, param):
        return OverloadedError(f"{code} {message} {param}")

    error = 'data: {"error": {"code": 503, "message": "busy", "param": null}}\n\n'
    with pytest.raises(OverloadedError, match="503 busy None"):
        await begun_stream(events(error), failure)
    assert closed == 1
    stream = await begun_stream(events("data: {}\n\n"), failure)
    assert len([event async for event in stream]) == 4
    assert closed == 2
    stream = await begun_stream(events("data: {}\n\n"), failure)
    assert await anext(stream)
    await stream.aclose()
    assert closed == 3


def test_the_engines_refusal_says_when_what_waits_will_be_read(clock):
    class Step:
        num_prompt_tokens = 100
        num_running_reqs, num_waiting_reqs = 1, 5

    queue = EngineQueue()
    queue.num_tokens = lambda: 3000
    assert queue.refusal().retry_after_s == 1
    for _ in range(50):
        clock.now += 0.25  # 400 tokens a second
        queue.record(Step, Step)
    refusal = queue.refusal()
    assert (refusal.status, refusal.code) == (503, "overloaded")
    assert refusal.retry_after_s in (8, 9)


FRESH = itertools.count(900_000)


def fresh():
    return data_url(noise(next(FRESH), (112, 112)))


@pytest.fixture
def narrow_server(demo_server):
    """The real engine, with room for two requests in its queue."""
    limits = demo_server.labeler.engine.engine._llm.scheduler_config
    before = limits.max_num_queued_tokens
    assert before == 16 * demo_server.labeler.engine.info.max_model_len
    limits.max_num_queued_tokens = 150
    yield demo_server
    limits.max_num_queued_tokens = before


async def all_at_once(url, path, bodies):
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await asyncio.gather(*(client.post(path, json=body) for body in bodies))


def chat_of(image, **more):
    content = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": image}},
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": "demo", "messages": messages, "max_tokens": 3, "temperature": 0, **more}


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("/v1/label", [{"image": fresh(), "text": f"post {i}"} for i in range(40)]),
        ("/v1/chat/completions", [chat_of(fresh()) for _ in range(40)]),
        ("/v1/chat/completions", [chat_of(fresh(), stream=True) for _ in range(40)]),
    ],
    ids=["label", "chat", "stream"],
)
def test_a_full_engine_refuses_with_retry_after_and_answers_the_rest(narrow_server, path, bodies):
    answers = asyncio.run(all_at_once(narrow_server.url, path, bodies))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "overloaded", answer.text
        assert int(answer.headers["retry-after"]) >= 1
    for answer in answers:
        if answer.status_code == 200 and bodies[0].get("stream"):
            assert '"error"' not in answer.text
            assert answer.text.rstrip().endswith("data: [DONE]")
    for body, answer in zip(bodies, answers, strict=True):  # those refused come again, one by one
        if answer.status_code != 200:
            again = narrow_server.post(path, body)
            assert again.status_code == 200, again.text
            assert '"error"' not in again.text


def test_a_cascade_that_was_let_in_is_answered_by_a_full_engine(narrow_server):
    cascades = [
        {"image": fresh(), "text": "x", "cascade": [0.2, 1.0], "confidence": 1.0} for _ in range(12)
    ]
    answers = asyncio.run(all_at_once(narrow_server.url, "/v1/label", cascades))
    codes = [answer.status_code for answer in answers]
    assert set(codes) <= {200, 503}, codes
    done = [answer.json() for answer in answers if answer.status_code == 200]
    assert done
    assert all(len(one["cascade"]) == 2 for one in done)
