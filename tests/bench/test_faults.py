"""Schedule, outcomes and tallies of the fault drills; nothing here starts an engine."""

import asyncio
import itertools
import json
import os
import signal
from collections import Counter
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from bench import answers, faults
from bench.__main__ import build_parser
from bench.answers import Answer, CounterGrowth, outcome_of, outcome_of_stream
from bench.arrivals import OpenLoop, arrivals
from bench.drills import ADAPTER, DRILLS, versions_note, write_turned_adapter
from bench.load import MIXTURE, Load
from bench.outcome import BenchError
from bench.poison import PHRASE
from bench.process_tree import descendants, is_alive
from serving.schema import ChatRequest, LabelRequest
from serving.settings import DEMO

WEIGHTS = {"a": 3.0, "b": 1.0}
CODE = {"error": {"message": "m", "code": "c"}}


def first(number, **changed):
    return list(itertools.islice(arrivals(4.0, WEIGHTS, **({"seed": 0} | changed)), number))


def test_a_schedule_has_its_rate_and_mixture_and_is_repeatable():
    found = first(4000)
    assert found == first(4000)
    assert found != first(4000, seed=1)
    assert found[-1].at_s == pytest.approx(1000, rel=0.05)
    gaps = np.diff([arrival.at_s for arrival in found])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as a Poisson process's
    share = sum(arrival.kind == "a" for arrival in found) / len(found)
    assert share == pytest.approx(0.75, abs=0.03)


async def test_arrivals_do_not_wait_for_answers_and_those_over_the_cap_are_counted():
    sent, answer, stop = [], asyncio.Event(), asyncio.Event()

    async def send(arrival):
        sent.append(arrival)
        await answer.wait()

    schedule = (SimpleNamespace(at_s=0.01 * number) for number in itertools.count())
    loop = OpenLoop(schedule, send, most_in_flight=5)
    running = asyncio.create_task(loop.run(stop))
    await asyncio.sleep(0.3)
    assert len(sent) == 5
    assert len(loop.dropped) > 5
    stop.set()
    answer.set()
    await running


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome"),
    [
        (200, {}, {"labels": {}}, answers.OK),
        (200, {}, CODE, answers.FAILED),
        (429, {"Retry-After": "1"}, CODE, answers.REFUSED),
        (503, {"retry-after": "1"}, CODE, answers.REFUSED),
        (503, {}, CODE, answers.FAILED),
        (503, {}, {"error": {"code": "engine_crashed"}}, answers.FAILED),
        (503, {"retry-after": "5"}, {"error": {"code": "engine_crashed"}}, answers.CRASHED),
        (400, {}, {"error": {"code": "quarantined"}}, answers.CRASHED),
        (400, {}, CODE, answers.FAILED),
        (500, {}, {"error": {"message": "Internal Server Error"}}, answers.FAILED),
    ],
)
def test_only_a_refusal_that_says_when_to_come_again_is_no_failure(status, headers, body, outcome):
    assert outcome_of(status, headers, body)[0] == outcome


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        (['data: {"choices": []}', "", "data: [DONE]"], answers.OK),
        (['data: {"choices": []}'], answers.BROKEN),
        (['data: {"choices": []}', 'data: {"error": {"code": "x"}}', "data: [DONE]"], "broken"),
        ([], answers.BROKEN),
    ],
)
def test_a_stream_is_whole_only_if_it_ends_and_holds_no_error(lines, outcome):
    assert outcome_of_stream(lines)[0] == outcome


EVENTS = 'data: {"choices": []}\n\ndata: [DONE]\n\n'


async def test_the_load_passes_our_schema_and_notes_every_answer():
    def serve(request):
        body = json.loads(request.content)
        if request.url.path == "/v1/chat/completions":
            ChatRequest(**body)
            return httpx.Response(200, text=EVENTS)
        LabelRequest(**body)
        if body["model"] == "sentiment":
            raise httpx.ConnectError("nobody listens")
        return httpx.Response(200, json={"probabilities": {"text": {}}})

    transport = httpx.MockTransport(serve)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        load = Load(client, "demo", rate=200.0, seed=0, most_in_flight=50)
        stop = asyncio.Event()
        running = asyncio.create_task(load.loop.run(stop))
        await asyncio.sleep(0.3)
        load.volley(12)
        await asyncio.sleep(0.1)
        stop.set()
        await running
    kinds = Counter(answer.kind for answer in load.answers)
    assert kinds["volley"] == 12
    assert set(kinds) == {*MIXTURE, "volley"}
    lost = {answer.kind for answer in load.answers if answer.outcome == answers.CONNECTION}
    assert lost == {"sentiment"}
    assert {answer.outcome for answer in load.answers} == {answers.OK, answers.CONNECTION}
    assert len(load.probes) == kinds[ADAPTER]


def answer(at_s, seconds=0.1, outcome=answers.OK):
    return Answer(kind="a", at_s=at_s, seconds=seconds, outcome=outcome)


def test_no_percentile_of_too_few_answers_and_none_of_failures():
    few = [answer(0)] * (answers.MIN_SAMPLES - 1)
    assert answers.p95([*few, answer(0, outcome=answers.FAILED)]) == f"n={len(few)}"
    assert answers.p95([*few, answer(0, 0.1)]) == f"100 (n={answers.MIN_SAMPLES})"


def test_growth_counts_series_that_come_later_and_keeps_those_that_go():
    growth = CounterGrowth()
    growth.see("x_total", 'x_total{replica="a"} 5.0\ny_total{replica="a"} 9.0')
    growth.see("x_total", 'x_total{replica="a"} 7.0\nx_total{replica="b"} 1.0')
    growth.see("x_total", 'x_total{replica="b"} 4.0')
    assert growth.total == 2 + 4


def test_an_answer_of_neither_version_is_called_mixed():
    def probabilities(p):
        return {"text": {"yes": p, "no": 1 - p}}

    old, new = [probabilities(0.9)], [probabilities(0.1)]
    seen = [(0, probabilities(p)) for p in (0.9, 0.89, 0.1, 0.5)]
    assert '"old": 2, "new": 1, "mixed": 1' in versions_note(seen, old, new)


def test_the_new_version_has_the_same_shape_and_other_weights(tmp_path):
    write_turned_adapter(DEMO / "adapters" / ADAPTER, tmp_path / f"{ADAPTER}@2")
    old = load_file(DEMO / "adapters" / ADAPTER / "adapter_model.safetensors")
    new = load_file(tmp_path / f"{ADAPTER}@2" / "adapter_model.safetensors")
    assert {name: each.shape for name, each in old.items()} == {
        name: each.shape for name, each in new.items()
    }
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {name for name in old if "lora_B" in name}


def test_the_tokenizer_gives_the_phrase_of_the_poison_back(demo_tokenizer):
    ids = demo_tokenizer.encode(f"<image>\nText: {PHRASE}\nWhat?")
    assert PHRASE in demo_tokenizer.decode(ids)


async def test_a_process_and_its_children_are_seen_until_they_end():
    process = await asyncio.create_subprocess_shell("sleep 30 & wait")
    while not (children := descendants(process.pid)):
        await asyncio.sleep(0.01)
    assert all(map(is_alive, [process.pid, *children]))
    for pid in [process.pid, *children]:
        os.kill(pid, signal.SIGKILL)
    await process.wait()
    assert not is_alive(process.pid)


def options(*argv):
    return build_parser().parse_args(["faults", *argv])


def test_the_table_has_a_row_a_drill_and_says_what_was_lost():
    run = faults.Run(
        drill="replica",
        answers=[answer(n / 4, outcome=answers.FAILED if n == 80 else "ok") for n in range(200)],
        struck_s=20.0,
        recovered_s=32.5,
        retried=3,
        dropped=2,
        lag_s=0.5,
        left=1,
        notes=["it fell"],
    )
    outcome = faults.summarise([run], options())
    (row,) = outcome.rows
    shown = dict(zip(outcome.headers, row, strict=True))
    assert (shown["sent"], shown["ok"], shown["failed"], shown["retried"]) == (200, 199, 1, 3)
    assert shown["recovered s"] == "12.5"
    assert shown["p95 ms before"] == "100 (n=80)"
    assert shown["during"] == "100 (n=49)"
    text = "\n".join(outcome.notes)
    assert "it fell" in text
    assert "2 arrivals dropped" in text
    assert "late by up to 0.50 s" in text
    assert "missed by 1" in text


def test_one_engine_is_refused_before_anything_starts():
    with pytest.raises(BenchError, match="nothing survives"):
        faults.run(options("--replicas", "1"))


def test_every_drill_is_named_in_the_help():
    for name in DRILLS:
        assert f"  {name} " in faults.__doc__
