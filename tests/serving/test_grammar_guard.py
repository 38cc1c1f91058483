"""Clients' grammars: cheap bounds first, then a trial that may be killed; nobody else waits."""

import asyncio
import json
import os
import resource
import signal
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from patches.canonical import spell
from serving.app import build_app
from serving.errors import BadRequestError, OverloadedError
from serving.following import Bulletin
from serving.grammar_guard import GrammarGuard, GrammarLimits
from serving.labeler import Labeler
from serving.metrics import Metrics
from serving.registry import Registry
from serving.schema import ChatRequest, check_chat
from serving.settings import Settings
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_labeler import catalogue

SMALL = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
QUICK = GrammarLimits(cpu_s=0.3)


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def rows(depth, count=200):
    """A small schema that takes `count ** depth` states."""
    if depth == 0:
        return {"type": "integer"}
    return {"type": "array", "items": rows(depth - 1), "minItems": count, "maxItems": count}


HUGE = rows(3)


def chat(schema):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return {
        "model": "base",
        "messages": [{"role": "user", "content": "x"}],
        "response_format": form,
    }


def chosen(*choices):
    body = {key: value for key, value in chat({}).items() if key != "response_format"}
    return body | {"structured_outputs": {"choice": list(choices)}}


def request(schema):
    return ChatRequest.model_validate(chat(schema))


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.fixture
def make_guard(demo_tokenizer):
    made = []

    def make(limits=QUICK, **options):
        made.append(GrammarGuard(demo_tokenizer, limits, **options))
        return made[-1]

    yield make
    for guard in made:
        guard.close()


REFUSED_CHEAPLY = {
    "a reference": {"$ref": "#"},
    "a loop of references": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}},
    "a dynamic reference": {"$dynamicRef": "#x"},
    "a pattern": closed(a={"type": "string", "pattern": "(a+)+b"}),
    "patterns of names": {"type": "object", "patternProperties": {"(a+)+b": {}}},
    "10^5 enum values": closed(a={"enum": [str(i) for i in range(10**5)]}),
    "129 enum values": closed(a={"enum": list(range(129))}),
    "65 properties": closed(**{f"p{i}": {"type": "integer"} for i in range(65)}),
    "65 alternatives": {"anyOf": [{"const": i} for i in range(65)]},
    "300 levels": nested(300),
    "13 levels": nested(13),
    "a long string": closed(a={"type": "string", "maxLength": 257}),
    "a negative bound": closed(a={"type": "string", "maxLength": -1}),
    "a bound that is no number": closed(a={"type": "array", "maxItems": "5"}),
    "a bound that is a truth": closed(a={"type": "array", "maxItems": True}),
    "a bound that is a fraction": closed(a={"type": "array", "maxItems": 1.5}),
    "2,001 values": closed(a={"enum": [list(range(100)) for _ in range(21)]}),
    "8,001 characters": closed(a={"const": "x" * 8001}),
}


@pytest.mark.parametrize("name", REFUSED_CHEAPLY)
def test_what_cannot_be_small_is_refused_without_compiling(name):
    with pytest.raises(BadRequestError) as refused:
        check_chat(request(REFUSED_CHEAPLY[name]), 32000, 2048)
    assert refused.value.param == "response_format"
    assert refused.value.code == "schema_too_complex"
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    "schema",
    [
        SMALL,
        closed(**{"$ref": {"type": "integer"}, "pattern": {"enum": ["maxLength"]}}),
        closed(a={"const": {"$ref": "data"}}),
        closed(a={"enum": [{"pattern": "x"}]}),
    ],
)
def test_names_and_values_are_no_keywords(schema):
    check_chat(request(schema), 32000, 2048)


@pytest.mark.parametrize("choices", [["x" * 257], ["x" * 250 + str(i) for i in range(40)], []])
def test_choices_are_bounded_each_and_together(choices):
    with pytest.raises(ValueError, match="choice"):
        ChatRequest.model_validate(chosen(*choices))


async def test_what_compiles_passes_and_is_remembered(make_guard):
    guard = make_guard(GrammarLimits())
    await guard.check(request(SMALL), None)
    worker = worker_of(guard)
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)  # so another answer can only be a remembered one
    try:
        await asyncio.wait_for(guard.check(request(SMALL), None), 5)
    finally:
        os.kill(worker, signal.SIGCONT)


def worker_of(guard):
    return guard._compiler._process and guard._compiler._process.pid


async def test_requests_without_a_grammar_start_no_process(make_guard):
    guard = make_guard()
    plain = {key: value for key, value in chat({}).items() if key != "response_format"}
    await guard.check(ChatRequest.model_validate(plain), None)
    own = ChatRequest.model_validate(plain | {"label_structure": "sentiment"})
    await guard.check(own, spell([5, 6]))
    assert worker_of(guard) is None


async def test_a_schema_over_the_time_is_refused_and_its_process_gone(make_guard):
    guard = make_guard(wait_s=120)
    await guard.check(request(SMALL), None)
    worker = worker_of(guard)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(BadRequestError, match=r"0\.3 s of processor time") as refused:
        await guard.check(request(HUGE), None)
    assert refused.value.code == "schema_too_complex"
    assert not Path(f"/proc/{worker}").exists()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    await guard.check(request(closed(a={"type": "integer"})), None)  # others go on


async def test_a_refusal_is_remembered_and_costs_nothing_again(make_guard):
    guard = make_guard(wait_s=120)
    for _ in range(2):
        with pytest.raises(BadRequestError, match="processor time"):
            await guard.check(request(HUGE), None)
        assert worker_of(guard) is None  # the second asked no process


async def test_a_schema_over_the_memory_is_refused(make_guard):
    guard = make_guard(GrammarLimits(cpu_s=60, memory=40 * 2**20), wait_s=120)
    with pytest.raises(BadRequestError, match="40 MiB of memory"):
        await guard.check(request(HUGE), None)
    await guard.check(request(SMALL), None)


async def test_an_index_over_the_size_is_refused(make_guard):
    guard = make_guard(GrammarLimits(cpu_s=60, index_bytes=1000), wait_s=120)
    with pytest.raises(BadRequestError, match="once compiled"):
        await guard.check(request(closed(a={"type": "string", "maxLength": 9})), None)


async def test_a_pattern_over_the_length_is_refused(make_guard):
    optional = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(64)}}
    with pytest.raises(BadRequestError, match="characters as a regular expression"):
        await make_guard(GrammarLimits()).check(request(optional), None)


@pytest.mark.parametrize("schema", [{"not": {}}, {"type": "wat"}])
async def test_a_schema_that_outlines_has_no_words_for_is_a_400(make_guard, schema):
    with pytest.raises(BadRequestError) as refused:
        await make_guard(GrammarLimits()).check(request(schema), None)
    assert refused.value.code == "invalid_schema"


async def test_choices_are_tried_with_the_ids_they_became(make_guard, demo_tokenizer):
    guard = make_guard(GrammarLimits())
    asked = ChatRequest.model_validate(chosen("a", "b"))
    await guard.check(asked, f"(?:{spell([5, 6])}|{spell([7])})")
    with pytest.raises(BadRequestError) as refused:
        await guard.check(asked, spell([5, demo_tokenizer.eos_token_id]))
    assert refused.value.param == "structured_outputs"


async def test_equal_schemas_at_once_are_compiled_once(make_guard):
    guard = make_guard(GrammarLimits(), max_pending=1)
    await asyncio.gather(*(guard.check(request(SMALL), None) for _ in range(100)))


async def test_too_many_different_schemas_at_once_are_told_to_come_again(make_guard):
    guard = make_guard(GrammarLimits(), max_pending=2)
    schemas = [closed(a={"const": i}) for i in range(5)]
    checks = (guard.check(request(schema), None) for schema in schemas)
    found = await asyncio.gather(*checks, return_exceptions=True)
    assert found.count(None) == 2
    assert [type(error) for error in found if error] == [OverloadedError] * 3


async def test_a_client_that_waits_too_long_is_told_so_and_the_verdict_still_comes(make_guard):
    guard = make_guard(GrammarLimits(), wait_s=0.0)
    with pytest.raises(OverloadedError):
        await guard.check(request(SMALL), None)
    ends = time.monotonic() + 60
    while guard._pending:
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)
    await guard.check(request(SMALL), None)


async def test_ten_thousand_different_schemas_leave_no_more_than_the_bound(make_guard):
    guard = make_guard(GrammarLimits(), num_verdicts=100)
    await guard.check(request(SMALL), None)
    for number in range(10_000):
        await guard.check(request({"const": number}), None)
    assert len(guard._verdicts) == 100
    assert not guard._pending


async def test_a_process_that_somebody_else_kills_condemns_no_schema(make_guard):
    guard = make_guard(GrammarLimits())
    await guard.check(request(SMALL), None)
    os.kill(worker_of(guard), signal.SIGKILL)
    other = request(closed(a={"type": "null"}))
    with pytest.raises(OverloadedError):
        await guard.check(other, None)
    await guard.check(other, None)


async def test_the_loop_answers_others_while_a_schema_compiles(make_guard):
    guard = make_guard(wait_s=120)
    check = asyncio.ensure_future(guard.check(request(HUGE), None))
    turns = 0
    while not check.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert turns > 10
    with pytest.raises(BadRequestError):
        await check


async def test_a_closed_guard_leaves_no_process(make_guard):
    guard = make_guard(GrammarLimits())
    await guard.check(request(SMALL), None)
    process = guard._compiler._process
    guard.close()
    assert process.wait(30) == -signal.SIGKILL


@pytest.fixture
def client(published_tokenizer):
    labeler = Labeler(FakeEngine(), catalogue(), published_tokenizer)
    app = build_app(
        labeler,
        Settings(),
        Metrics(CollectorRegistry()),
        bulletin=Bulletin(labeler.catalogue),
        adapters=Registry(None, check=None),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (chat(SMALL), 200),
        (chosen("good", "bad"), 200),
        (chat({"$ref": "#"}), 400),
        (chat({"not": {}}), 400),
        (chosen("</s>"), 400),
        (chosen("x" * 300), 400),
        (chosen() | {"structured_outputs": {"regex": "(a+)+b"}}, 400),
        (chosen() | {"structured_outputs": {"grammar": "root ::= x"}}, 400),
    ],
)
async def test_over_http_a_grammar_is_answered_or_a_400(client, body, status):
    answered = await client.post("/v1/chat/completions", json=body)
    assert answered.status_code == status, answered.text
    assert status == 200 or json.loads(answered.text)["error"]["param"]
