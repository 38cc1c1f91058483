"""Clients' grammars with the real engine: a bad one fails alone, and then the machine is idle."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from patches.canonical import spell
from patches.config import Retention
from serving.errors import SieveError
from serving.process_family import descendants
from serving.protocol import ChatCall
from tests.pictures import data_url, noise
from tests.serving.test_grammar_guard import HUGE, REFUSED_CHEAPLY, chat, chosen, closed

MOOD = closed(mood={"enum": ["good", "bad"]}, sure={"type": "boolean"})


def stat_of(pid):
    """The fields after a process's name; None where it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def family():
    """Processes that this one started, and theirs: number to when each began."""
    stats = {pid: stat_of(pid) for pid in descendants(os.getpid())}
    return {pid: stat[19] for pid, stat in stats.items() if stat}


def engine_processes():
    """Engine core and worker, by what they call themselves."""
    return {pid: started for pid, started in family().items() if b"VLLM" in command_of(pid)}


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def cpu_s():
    """Seconds of processor time that each process of the family took so far."""
    stats = {pid: stat_of(pid) for pid in family()}
    tick = os.sysconf("SC_CLK_TCK")
    return {pid: (int(stat[11]) + int(stat[12])) / tick for pid, stat in stats.items() if stat}


def asked(server, body):
    return server.post("/v1/chat/completions", body | {"model": "demo", "max_tokens": 40})


def test_a_small_schema_and_choices_shape_the_answer(demo_server):
    answer = asked(demo_server, chat(MOOD)).json()["choices"][0]["message"]["content"]
    assert set(json.loads(answer)) == {"mood", "sure"}
    answer = asked(demo_server, chosen("good", "bad")).json()["choices"][0]["message"]["content"]
    assert answer in ("good", "bad")


@pytest.mark.parametrize("name", ["too complex", *REFUSED_CHEAPLY])
def test_a_bad_schema_is_refused_while_a_label_is_answered_by_the_same_engine(demo_server, name):
    before = engine_processes()
    assert before
    schema = REFUSED_CHEAPLY.get(name, HUGE)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(asked, demo_server, chat(schema))
        label = demo_server.label(image=data_url(noise()), text="a day")
        answer = refused.result()
    assert label["labels"]
    # On a machine that others keep busy, the limit on processor time may take over 10 s to reach.
    is_busy = schema is HUGE and answer.status_code == 503
    assert answer.status_code == 400 or is_busy, answer.text
    assert answer.json()["error"]["message"]
    assert engine_processes() == before


def test_after_a_schema_too_complex_nothing_compiles_it_any_more(demo_server):
    ends = time.monotonic() + 120
    while asked(demo_server, chat(HUGE)).status_code == 503:
        assert time.monotonic() < ends, "no verdict"
        time.sleep(1)
    assert not [pid for pid in family() if b"grammar_worker" in command_of(pid)]
    time.sleep(5)
    before = cpu_s()
    time.sleep(5)
    used = {pid: seconds - before.get(pid, 0) for pid, seconds in cpu_s().items()}
    busy = {command_of(pid)[:80]: seconds for pid, seconds in used.items() if seconds > 1}
    # Who went on with it would take a core. Idle workers look for work all the time, and cannot.
    assert not [name for name in busy if b"Worker" not in name], busy


@pytest.mark.parametrize("eos", ["alone", "in company"])
def test_a_grammar_that_fails_in_the_engine_itself_fails_alone(demo_server, eos):
    """None gets so far over HTTP; were one to, this is all that happens."""
    engine, before = demo_server.labeler.engine, engine_processes()
    call = ChatCall(
        request_id=f"bad-{eos}",
        body={"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
        retention=Retention(),
        pattern=spell([5, demo_server.labeler.tokenizer.eos_token_id]),
    )
    with ThreadPoolExecutor(1) as pool:
        label = pool.submit(demo_server.label, text="a day") if eos == "in company" else None
        with pytest.raises(SieveError) as failed:
            demo_server.call(engine.chat(call))
        assert label is None or label.result()["labels"]
    assert failed.value.status in (400, 503)
    assert engine_processes() == before
    assert demo_server.label(text="another")["labels"]
