"""What a key may do once it is in: how often, how many at once, which models; its own cache."""

import asyncio
import json
import random
import re

import pytest

from serving.errors import KeyLimitError
from serving.keyring import Allowance
from serving.keys import Key, hash_of
from tests.serving.key_home import (
    CHAT,
    LABEL,
    SECRETS,
    TALK,
    Clock,
    ask,
    check_refusal,
    client_of,
    listening,
)

# Limits of a key


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_key_has_as_many_requests_at_once_as_it_may(guarded, slow_engine):
    slow_engine.may_go.clear()
    async with client_of(guarded, "single") as client:
        first = asyncio.create_task(client.post(LABEL, json={"text": "x"}))
        await until(lambda: slow_engine.num_inside == 1)
        check_refusal(await client.post(LABEL, json={"text": "x"}), 429, "key_concurrency")
        check_refusal(await client.get("/v1/models"), 429, "key_concurrency")
        assert (await ask(guarded, "user", "GET", "/v1/models")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        slow_engine.may_go.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("does_leave", [False, True])
async def test_a_stream_holds_its_place_until_its_end(guarded, slow_engine, does_leave):
    slow_engine.may_go.clear()
    talk = json.dumps({**TALK, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(talk)}\r\n"
    head += f"Content-Type: application/json\r\nAuthorization: Bearer {SECRETS['single']}\r\n\r\n"

    async def listed():
        return (await ask(guarded, "single", "GET", "/v1/models")).status_code

    async with listening(guarded) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + talk)
        assert (await reader.readuntil(b"data: {}\n\n")).startswith(b"HTTP/1.1 200")
        assert await listed() == 429
        if does_leave:
            writer.transport.abort()
        else:
            slow_engine.may_go.set()
            await reader.readuntil(b"[DONE]\n\n")
        async with asyncio.timeout(10):
            while await listed() == 429:
                await asyncio.sleep(0.01)
        writer.close()
    assert await listed() == 200


async def test_a_request_that_fails_gives_its_place_back(guarded, slow_engine):
    for _ in range(5):
        answer = await ask(guarded, "single", "POST", LABEL, json={"text": 5})
        assert answer.status_code == 400
        answer = await ask(guarded, "single", "POST", LABEL, content=b"{")
        assert answer.status_code == 400
    slow_engine.is_dead = True
    for _ in range(3):
        answer = await ask(guarded, "single", "POST", LABEL, json={"text": "x"})
        assert answer.json()["error"]["code"] == "engine_dead"


async def test_a_key_that_sends_too_often_is_told_when_to_come_again(guarded):
    for _ in range(2):
        assert (await ask(guarded, "rated", "GET", "/v1/models")).status_code == 200
    answer = await ask(guarded, "rated", "GET", "/v1/models")
    check_refusal(answer, 429, "key_rate")
    assert 25 <= int(answer.headers["retry-after"]) <= 30  # one every thirty seconds
    assert (await ask(guarded, "user", "GET", "/v1/models")).status_code == 200


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_whoever_waits_as_told_gets_in_and_nobody_exceeds_the_rate(per_minute):
    key = Key(name="a", sha256="0" * 64, per_minute=per_minute)
    clock, rng = Clock(), random.Random(per_minute)
    allowance, passed, refused = Allowance(clock), [], 0

    def attempt():
        with allowance.passage(key):
            passed.append(clock.now)

    for _ in range(6 * per_minute + 20):
        try:
            attempt()
        except KeyLimitError as error:
            refused += 1
            clock.now += error.retry_after_s
            attempt()
        clock.now += rng.choice([0, 0, 0.2, 5]) / per_minute
    assert refused
    for start in passed:
        within = sum(start <= at < start + 60 for at in passed)
        assert within <= 2 * per_minute + 1  # a full bucket and what fills it meanwhile


def test_the_wait_for_a_place_follows_how_long_requests_take():
    key = Key(name="a", sha256="0" * 64, max_concurrency=2)
    clock = Clock()
    allowance = Allowance(clock)

    def told():
        with allowance.passage(key), allowance.passage(key):
            with pytest.raises(KeyLimitError) as refused, allowance.passage(key):
                pass
            return refused.value.retry_after_s

    assert told() == 1
    for _ in range(100):
        with allowance.passage(key):
            clock.now += 20
    assert told() == 10  # two places, twenty seconds each: one is free every ten


# Which models


async def test_a_key_asks_for_its_own_models_only(guarded, slow_engine):
    for name, model, status in [
        ("narrow", "tuned", 200), ("narrow", "other", 403), ("narrow", "base", 403),
        ("narrow", None, 403), ("narrow", "nobody", 403), ("base", None, 200),
        ("base", "base", 200), ("base", "tuned", 403), ("user", "other", 200),
    ]:  # fmt: skip
        label = {"text": "x"} if model is None else {"text": "x", "model": model}
        answer = await ask(guarded, name, "POST", LABEL, json=label)
        assert answer.status_code == status, (name, model, answer.text)
        if model is not None:
            talk = await ask(guarded, name, "POST", CHAT, json={**TALK, "model": model})
            assert talk.status_code == status, (name, model, talk.text)
        if status == 403:
            check_refusal(answer, 403, "adapter_not_allowed")


async def test_a_key_hears_of_no_other_models(guarded):
    listed = (await ask(guarded, "narrow", "GET", "/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["tuned"]
    assert "own" not in listed["label_structures"]
    assert "own" in (await ask(guarded, "user", "GET", "/v1/models")).json()["label_structures"]
    bodies = [
        {"model": "missing"},  # allowed, but not served
        {"model": "other"},
        {"model": "tuned", "label_structure": "own"},
        {"model": "tuned", "label_structure": "nothing"},
    ]
    for body in bodies:
        answer = await ask(guarded, "narrow", "POST", LABEL, json={"text": "x", **body})
        assert 400 <= answer.status_code < 500
        message = answer.json()["error"]["message"].replace(f"model={body['model']!r}", "")
        assert "other" not in message
        assert "mood" not in answer.text
    answer = await ask(guarded, "narrow", "POST", LABEL, json={"text": "x", "model": "missing"})
    check_refusal(answer, 404, "model_not_found")


# Salt


async def test_every_key_has_a_prefix_cache_of_its_own(guarded, slow_engine, make_guarded):
    async def salts(name, served=guarded):
        slow_engine.requests.clear()
        assert (await ask(served, name, "POST", LABEL, json={"text": "x"})).status_code == 200
        assert (await ask(served, name, "POST", CHAT, json=TALK)).status_code == 200
        return {request.cache_salt for request in slow_engine.requests}

    found = {name: await salts(name) for name in ("user", "admin", "base")}
    assert all(len(each) == 1 for each in found.values())
    assert len(set.union(*found.values())) == 3
    assert await salts("user") == found["user"]
    assert await salts(None, make_guarded()) == {None}
    hashes = "".join(hash_of(secret) for secret in SECRETS.values())
    for (salt,) in found.values():
        assert salt not in hashes
        assert re.fullmatch(r"[0-9a-f]{32}", salt)  # vLLM allows 128 characters, few others
    assert not any(salt in repr(slow_engine.requests) for (salt,) in found.values())
