"""A short seeded fuzz, and that it would see what it looks for."""

import asyncio
import json
import random
import signal
from collections import Counter

import httpx
import pytest

from bench import fuzz, fuzz_files
from bench.__main__ import main
from bench.bad_pictures import BROKEN, FORMATS, ODD, small
from bench.bad_requests import BEYOND
from bench.fuzz_files import DECODED, FAILED, REFUSED, file_of
from bench.fuzz_files import fuzz_files as fuzzed_files
from bench.mutations import changed, damaged
from serving.errors import BadRequestError
from serving.images import ImageLimits, decode_image
from serving.settings import DEMO


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused(name):
    with pytest.raises(BadRequestError):
        decode_image(BROKEN[name](), ImageLimits())


def test_a_picture_that_is_only_odd_is_decoded_or_refused():
    for make in ODD.values():
        try:
            assert decode_image(make(), ImageLimits()).mode == "RGB"
        except BadRequestError:
            continue


def test_damaged_files_are_decoded_or_refused():
    counts, failures = fuzzed_files(seed=1, seconds=120, most=1000)
    assert not failures, "\n".join(map(str, failures))
    for form in FORMATS:
        assert counts[form].total() == 200
        assert counts[form][DECODED]  # the damage is small enough to get past the header
        assert counts[form][REFUSED]


async def test_damaged_bodies_are_answered_or_refused():
    counts, failures = await fuzz.fuzz_bodies(seed=1, seconds=120, most=400)
    assert not failures, "\n".join(map(str, failures))
    assert sum(count.total() for count in counts.values()) == 400
    assert all(count["200"] and count["400"] for count in counts.values())


async def test_bodies_that_are_damaged_are_good_before():
    async with fuzz.stub_app(fuzz.fuzz_settings()) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://fuzz") as client:
            for path, body in fuzz.valid_bodies():
                answer = await client.post(path, json=body)
                assert answer.status_code == 200, (body, answer.text)


def test_the_same_seed_makes_the_same_inputs():
    assert [file_of(3, number) for number in range(20)] == [file_of(3, n) for n in range(20)]
    assert file_of(3, 0) != file_of(4, 0)
    body = {"a": [1, {"b": "c"}]}
    made = {changed(body, random.Random(number)) for number in range(50)}
    assert len(made) > 25
    assert body == {"a": [1, {"b": "c"}]}  # what is damaged is a copy
    assert damaged(b"", random.Random(0)) == b""


def test_what_ends_its_process_or_raises_is_a_failure(monkeypatch, tmp_path):
    """The child is replaced by one that is killed at its second file."""
    script = tmp_path / "bench_child.py"
    script.write_text(
        "import os, signal, sys\n"
        "from multiprocessing.connection import Connection\n"
        "outcomes = Connection(int(sys.argv[-1]), readable=False)\n"
        "outcomes.send(('refused', ''))\n"
        f"os.kill(os.getpid(), {int(signal.SIGSEGV)})\n"
    )
    start = fuzz_files.subprocess.Popen

    def killed(command, **options):
        return start([command[0], str(script), *command[3:]], **options)

    monkeypatch.setattr(fuzz_files.subprocess, "Popen", killed)
    counts, failures = fuzzed_files(seed=0, seconds=60, most=2)
    assert sum(count[FAILED] for count in counts.values()) == 1
    assert f"{-signal.SIGSEGV}" in failures[0].what
    assert failures[0].raw == file_of(0, 1)[1]
    assert fuzz_files._decode(small("PNG")) == (DECODED, "")
    monkeypatch.setattr(fuzz_files, "decode_image", lambda *_: 1 / 0)
    assert fuzz_files._decode(b"") == (FAILED, "ZeroDivisionError('division by zero')")


@pytest.mark.parametrize(
    ("status", "body", "is_fault"),
    [
        (200, {}, False),
        (500, {"error": {"message": "x", "type": "x", "param": None, "code": None}}, True),
        (503, {"error": {"message": "x", "type": "x", "param": None, "code": None}}, True),
        (400, {"error": {"message": "x", "type": "x", "param": None, "code": None}}, False),
        (400, {"detail": "x"}, True),
        (404, {"error": {"message": "x"}}, True),
    ],
)
def test_faults_of_answers_are_seen(status, body, is_fault):
    assert bool(fuzz.fault_of(httpx.Response(status, content=json.dumps(body)))) == is_fault


def test_a_failure_is_printed_with_its_input_and_ends_with_1(monkeypatch, capsys):
    failure = fuzz_files.Failure(kind="PNG", what="MemoryError()", raw=b"abc")
    monkeypatch.setattr(fuzz, "fuzz_files", lambda *_: ({"PNG": Counter(failed=1)}, [failure]))

    async def none(*_):
        await asyncio.sleep(0)
        return {}, []

    monkeypatch.setattr(fuzz, "fuzz_bodies", none)
    assert main(["fuzz", "--seconds", "1"]) == 1
    assert "YWJj" in capsys.readouterr().out


def test_ids_beyond_the_tokenizer_are_those_of_the_demo(demo_tokenizer):
    config = json.loads((DEMO / "base" / "config.json").read_text())
    ids = range(len(demo_tokenizer), config["text_config"]["vocab_size"])
    assert list(BEYOND) == list(map(str, ids))
