"""Arguments, summaries and what is sent; nothing here starts an engine or looks at a clock."""

import asyncio
import base64
import io
import json
import os
import sys

import httpx
import pytest
from PIL import Image

from bench import contest, server, tower
from bench.__main__ import COMMANDS, build_parser, main
from bench.checkpoints import IMAGE_TOKEN_ID, write_shape
from bench.environment import describe
from bench.flops import Shape
from bench.outcome import BenchError
from bench.pictures import picture_url
from bench.processes import Server, free_port, running
from bench.statistics import Sample
from serving.schema import ChatRequest, LabelRequest
from serving.settings import Settings


def options(*argv):
    return build_parser().parse_args(argv)


def samples(seconds_by_variant, num_rounds=3):
    return [
        Sample(round=index, variant=variant, seconds=seconds * (1 + index))
        for variant, seconds in seconds_by_variant.items()
        for index in range(num_rounds)
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_what_is_measured_and_its_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Goal" in text
    assert "--json" in text
    assert "default" in text


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["speed"],
        ["tower", "--rounds", "0"],
        ["tower", "--images", "-1"],
        ["shape", "--layers", "two"],
        ["shape", "llava-1.6-7b"],
        ["server", "--workloads", "embed"],
        ["server", "--json", "nowhere/at/all.json"],
    ],
)
def test_a_wrong_argument_ends_with_2_and_says_which(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["shape", "--selector", "best"], "cls-last"),
        (["shape", "--tower-layers", "1"], "start at 2"),
        (["shape", "--tokenizer", "nowhere"], "tokenizer.model"),
        (["shape", "--ratios", "0.4", "1.0"], "1.0 comes first"),
        (["shape", "--before", "A"], "NAME=VALUE"),
        (["shape", "--ratios", "1.0", "1.4"], "retention_ratio=1.4"),
        (["server", "--model", "nowhere"], "config.json"),
        (["server", "--logs", "nowhere"], "no such folder"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_starts(argv, word, capsys, tmp_path):
    if argv[0] == "server" and "--model" not in argv:
        (tmp_path / "config.json").write_text("{}")
        argv = [*argv, "--model", str(tmp_path)]
    assert main(argv) == 2
    assert word in capsys.readouterr().err


def test_tower_throughput_is_paired_with_stock():
    found = tower.summarise(
        samples({"stock": 1.0, "served": 1.0, "scored": 1.25, "scoring": 0.01}),
        Shape(),
        options("tower"),
    ).results
    assert found["served"]["throughput_of_stock"]["median"] == pytest.approx(1.0)
    assert found["scored"]["throughput_of_stock"]["median"] == pytest.approx(0.8)
    assert found["scoring_share"]["median"] == pytest.approx(0.01)


def test_server_ratio_is_our_rate_over_theirs():
    seconds = {f"{name}/{side}": t for name in contest.WORKLOADS for side, t in SIDES.items()}
    outcome = server.summarise(samples(seconds), [], options("server"))
    assert [row[-1] for row in outcome.rows] == ["no", "no", "no"]
    assert outcome.results["chat"]["ratio"]["median"] == pytest.approx(0.8)


SIDES = {contest.OURS: 1.0, contest.THEIRS: 0.8}


def test_our_requests_pass_our_own_schema_and_theirs_differ_only_where_they_must():
    post = contest.Post(text="a day", image=picture_url(0, 0))
    arena = contest.Contest("demo", max_tokens=1, adds_bos=True)
    path, body = arena.request("label", contest.OURS, post)
    assert path == "/v1/label"
    LabelRequest(**body)
    for workload in ("choice", "chat"):
        (_, ours), (_, theirs) = (
            arena.request(workload, side, post) for side in (contest.OURS, contest.THEIRS)
        )
        ChatRequest(**ours)
        shared = {key: value for key, value in ours.items() if key in theirs}
        assert set(ours) - set(shared) == {"retention_ratio"}
        assert set(theirs) - set(shared) == {"add_special_tokens"}
        assert shared == {key: theirs[key] for key in shared}


def test_their_server_runs_without_our_plugin_and_both_share_limits(tmp_path):
    settings = Settings(model=str(tmp_path), max_num_seqs=7)
    ours, theirs = contest.our_server(settings, 1), contest.their_server(settings, 1)
    assert theirs.environment["VLLM_PLUGINS"] == ""
    assert {**ours.environment, "VLLM_PLUGINS": ""} == theirs.environment
    for each in (ours, theirs):
        assert each.arguments[each.arguments.index("--max-num-seqs") + 1] == "7"
        assert str(each.port) in each.arguments


async def test_the_closed_loop_sends_each_request_once_and_never_more_than_asked_at_once():
    sent, at_once = [], [0, 0]

    async def answer(request):
        at_once[0] += 1
        at_once[1] = max(at_once)
        sent.append(json.loads(request.content)["number"])
        await asyncio.sleep(0)
        at_once[0] -= 1
        return httpx.Response(200, json={})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        requests = [("/", {"number": number}) for number in range(20)]
        await contest.closed_loop(client, requests, 3)
    assert sorted(sent) == list(range(20))
    assert at_once[1] == 3


async def test_an_answer_that_is_no_200_ends_the_run_with_what_it_said():
    transport = httpx.MockTransport(lambda request: httpx.Response(503, text="too busy"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(BenchError, match="503 too busy"):
            await contest.closed_loop(client, [("/v1/label", {})] * 4, 2)


def test_pictures_are_fresh_and_repeatable():
    urls = {picture_url(seed, index, (64, 48)) for seed in (0, 1) for index in range(5)}
    assert len(urls) == 10
    assert picture_url(1, 4, (64, 48)) in urls
    raw = base64.b64decode(picture_url(0, 0, (64, 48)).split(",", 1)[1])
    assert Image.open(io.BytesIO(raw)).size == (64, 48)


def test_the_written_shape_loads_as_llava_with_the_published_ids(tmp_path):
    from transformers import AutoConfig, AutoProcessor

    write_shape(tmp_path, Shape(layers=2), None)
    config = AutoConfig.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert (config.text_config.num_hidden_layers, config.text_config.intermediate_size) == (
        2,
        11008,
    )
    assert config.vision_config.num_hidden_layers == 24
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_index
    assert processor.tokenizer.encode("hi<image>")[-1] == IMAGE_TOKEN_ID


def test_the_environment_names_command_and_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = describe(["tower", "--rounds", "2"])
    assert found["command"] == "python -m bench tower --rounds 2"
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hidden" not in json.dumps(found)
    assert "torch" in found["packages"]


def test_a_server_that_ends_early_is_reported_with_its_log_and_the_other_is_stopped(tmp_path):
    write_pid = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    stays = fake_server("stays", f"{write_pid}; time.sleep(600)")
    ends = fake_server(
        "ends", "import time; time.sleep(1); print('no such model'); raise SystemExit(3)"
    )
    with pytest.raises(BenchError, match="status 3"), running([ends, stays], tmp_path):
        pass
    assert "no such model" in (tmp_path / "ends.log").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def fake_server(name, script):
    return Server(
        name=name,
        arguments=["-c", script],
        port=free_port(),
        ready_path="/",
        environment={"PYTHON": sys.executable},
    )
