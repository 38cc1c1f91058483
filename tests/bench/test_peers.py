"""Peers: who takes turns with whom, what is said of them, and whether two generators agree."""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from bench import agreement, peers
from bench.__main__ import build_parser, main
from bench.agreement import CLOSED, METRICS, OPEN, Figures, agreements, chat_body, serve_arguments
from bench.batch_peer import STRUCTURE
from bench.contest import Posts
from bench.generator import CHAT
from bench.line_process import LineProcess
from bench.outcome import BenchError
from bench.peer_arms import Labelled, vllm_body
from bench.process_tree import descendants, paused
from bench.processes import free_port
from bench.statistics import Sample
from serving.schema import ChatRequest
from serving.settings import DEMO


def options(*argv):
    return build_parser().parse_args(["peers", *argv])


class Labels:
    """Answers `label` for every post, and remembers the posts."""

    def __init__(self, label, seconds):
        self.answer, self.seconds, self.blocks = label, seconds, []

    def label(self, posts):
        self.blocks.append(list(posts))
        return Labelled(seconds=self.seconds, labels=[self.answer] * len(posts))


SECONDS = {
    peers.FULL: 2.0,
    peers.KEPT: 1.0,
    peers.DEFAULT: 2.0,
    peers.VLLM: 4.0,
    peers.RUN_BATCH: 1.5,
    peers.GENERATE: 10.0,
}


def turns(*argv):
    arms = {name: Labels("neutral", seconds) for name, seconds in SECONDS.items()}
    arms[peers.GENERATE].answer = "positive"
    chosen = options("--block", "4", "--rounds", "2", *argv)
    posts = Posts(0, (32, 32))
    samples, labels = peers._take_turns(arms, [], {}, posts, chosen)
    return arms, peers.summarise(samples, labels, [], chosen)


def test_all_peers_of_a_round_label_the_same_posts_and_no_post_comes_twice_to_a_server():
    arms, _ = turns()
    same = [arms[name].blocks for name in (peers.FULL, peers.VLLM, peers.GENERATE)]
    assert all(blocks == same[0] for blocks in same)
    texts = [
        [[post.text for post in b] for b in blocks] for blocks in (same[0], arms[peers.KEPT].blocks)
    ]
    assert texts[0] == texts[1]
    assert arms[peers.RUN_BATCH].blocks == same[0][1:], "its process starts cold each time"
    names = (peers.FULL, peers.KEPT, peers.DEFAULT)
    ours = [post.image for name in names for block in arms[name].blocks for post in block]
    assert len(set(ours)) == len(ours)


def test_ours_is_a_multiple_of_every_peer_and_the_goal_is_held_against_each():
    _, outcome = turns()
    found = outcome.results
    assert found[peers.VLLM]["ratio"]["median"] == pytest.approx(2.0)
    assert found[peers.VLLM]["ratios"][peers.KEPT]["median"] == pytest.approx(4.0)
    assert found[peers.RUN_BATCH]["posts_per_s"] == pytest.approx(4 / 1.5)
    verdicts = {row[0]: row[-1] for row in outcome.rows}
    assert verdicts[peers.VLLM] == verdicts[peers.GENERATE] == "yes"
    assert verdicts[peers.RUN_BATCH] == "no"
    assert verdicts[peers.KEPT] == ""


def test_labels_are_compared_with_ours_on_the_same_posts_only():
    _, outcome = turns()
    same = {name: found["same_labels"] for name, found in outcome.results.items()}
    assert same[peers.VLLM] == 1.0
    assert same[peers.GENERATE] == 0.0
    assert same[peers.DEFAULT] is None


def test_a_block_that_is_not_labelled_whole_ends_the_run():
    class Short(Labels):
        def label(self, posts):
            return replace(super().label(posts), labels=["neutral"])

    with pytest.raises(BenchError, match="1 of 4 posts"):
        peers._take_turns(
            {peers.FULL: Short("", 1.0)}, [], {}, Posts(0, (32, 32)), options("--block", "4")
        )


def test_whoever_is_paused_stands_still_and_goes_on_even_after_a_failure():
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        try:
            until(lambda: [comm(pid) for pid in descendants(process.pid)] == ["sleep"])
            (child,) = descendants(process.pid)
            with pytest.raises(BenchError):
                fail_beside(process.pid, child)
            until(lambda: "T" not in (state(process.pid), state(child)))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def fail_beside(*pids):
    with paused(pids[:1]):
        until(lambda: {state(pid) for pid in pids} == {"T"})
        raise BenchError("of whoever works meanwhile")


def until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_refusal_of_ray_serve_llm_names_both_versions():
    needs = importlib.metadata.requires("ray") or []
    (pin,) = [
        need.split(";")[0].split("==")[1].strip() for need in needs if need.startswith("vllm")
    ]
    assert pin != peers._vllm_version()
    assert pin in peers.ray_serve_llm()
    assert peers._vllm_version() in peers.ray_serve_llm()


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model", "nowhere"], "config.json"),
        (["--logs", "nowhere"], "no such folder"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_starts(argv, word, capsys):
    assert main(["peers", *argv]) == 2
    assert word in capsys.readouterr().err


# --- two generators


def test_both_generators_send_the_same_chat():
    """What `bench serve` sends is made by vLLM's own code from our file and arguments."""
    from vllm.benchmarks.datasets import CustomImageDataset
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, _get_chat_messages
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    post = Posts(0, (32, 32)).fresh()
    ours = chat_body("sentiment", post)
    ChatRequest(**ours)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    ask = agreement.Ask(url="http://h:1", base="b", model="sentiment", rate=2.5, concurrency=4)
    args = parser.parse_args(serve_arguments(ask, OPEN, Path("posts.jsonl"), 100, 0))
    assert (args.request_rate, args.max_concurrency, args.burstiness) == (2.5, 4, float("inf"))
    content = CustomImageDataset._process_interleaved_content(agreement._content(post))
    sent = RequestFuncInput(
        prompt=content,
        api_url="",
        prompt_len=1,
        output_len=args.custom_output_len,
        model=args.model,
    )
    assert _get_chat_messages(sent) == ours["messages"]
    assert args.custom_output_len == ours["max_completion_tokens"]
    assert {**ours, **args.extra_body} == ours
    saturated = parser.parse_args(serve_arguments(ask, CLOSED, Path("posts.jsonl"), 100, 0))
    assert saturated.request_rate == float("inf")


def test_figures_count_from_when_a_request_was_due():
    figures = Figures.of([0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 4.0])
    assert figures.median_ms == pytest.approx(500)
    assert figures.posts_per_s == pytest.approx(1.0)
    assert {figures.value(metric) for metric in METRICS} == set(vars(figures).values())


def figures_of(ms):
    return [Figures(posts_per_s=10.0, median_ms=each, p90_ms=2 * each) for each in ms]


@pytest.mark.parametrize(
    ("outside", "is_close"),
    [
        ([100, 104, 96], True),
        ([103, 103, 103], True),
        ([130, 90, 125], True),
        ([120, 125, 130], False),
    ],
)
def test_generators_agree_within_noise_or_within_a_twentieth(outside, is_close):
    found = {
        f"{load}/{who}": figures_of(ms)
        for load in (OPEN, CLOSED)
        for who, ms in ((agreement.OURS, [100, 100, 100]), (agreement.OUTSIDE, outside))
    }
    verdicts = {(each.load, each.metric): each.is_close for each in agreements(found)}
    assert len(verdicts) == 2 * len(METRICS)
    assert verdicts[OPEN, "median ms"] is is_close
    assert verdicts[OPEN, "posts/s"] is True


def test_a_child_answers_each_line_and_its_own_prints_are_no_answers(tmp_path):
    script = (
        "import sys; from bench.line_process import replies, reply\n"
        "with replies() as stream:\n"
        "    reply(stream)\n"
        "    for line in sys.stdin:\n"
        "        print('noise', flush=True); reply(stream, line.strip().upper())\n"
        "        if 'end' in line: raise SystemExit('it fell over')\n"
    )
    with LineProcess(["-c", script], tmp_path / "child.log") as child:
        assert [child.ask(word).strip() for word in ("one", "two", "end")] == ["ONE", "TWO", "END"]
        with pytest.raises(BenchError, match="it fell over"):
            child.ask("three")


def test_vllm_is_asked_for_labels_as_training_spells_them():
    body = vllm_body("sentiment", Posts(0, (32, 32)).fresh(), adds_bos=True)
    (labels,) = STRUCTURE.fields.values()
    assert body["structured_outputs"]["choice"] == [f" {label}" for label in labels]
    assert body["add_special_tokens"] is True


class Listener:
    """A server that answers each chat with a stream, and keeps what it was sent."""

    def __init__(self):
        self.bodies = []
        self.app = FastAPI()
        self.app.post(CHAT)(self.answer)

    async def answer(self, body: dict[str, Any]) -> StreamingResponse:
        self.bodies.append(body)
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        chunks = [
            {"model": body["model"], "choices": [{"index": 0, "delta": {"content": "neutral"}}]},
            {"model": body["model"], "choices": [], "usage": usage},
        ]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return StreamingResponse(
            iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream"
        )

    @contextlib.contextmanager
    def listening(self):
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(self.app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.long
def test_what_arrives_is_the_same_from_both_generators():
    listener, posts, drawn = Listener(), Posts(0, (32, 32)), []

    def fresh(count):
        drawn.append(posts.block(count))
        return drawn[-1]

    with listener.listening() as url:
        ask = agreement.Ask(
            url=url, base=str(DEMO / "base"), model="sentiment", rate=50.0, concurrency=2
        )
        found = agreement.compare(ask, fresh, rounds=1, count=5, seed=0)
    assert {(each.load, each.metric) for each in found} == {
        (load, metric) for load in (OPEN, CLOSED) for metric in METRICS
    }
    assert all(each.ours > 0 and each.outside > 0 for each in found)
    sent = [
        json.dumps(chat_body("sentiment", post), sort_keys=True)
        for block in drawn
        for post in block
    ]
    arrived = [json.dumps(body, sort_keys=True) for body in listener.bodies]
    assert len(drawn) == 2 * 2 * 2, "two generators, two loads, a warm-up round and one more"
    assert sorted(arrived) == sorted(sent)


@pytest.mark.long
def test_all_peers_run_and_agree_on_most_labels(tmp_path):
    stored = tmp_path / "peers.json"
    sizes = [
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--block",
        "16",
        "--count",
        "20",
        "--batch-size",
        "4",
    ]
    assert main(["peers", *sizes, "--json", str(stored)]) == 0
    results = json.loads(stored.read_text())["results"]
    names = {*SECONDS, f"{peers.GENERATE} x4"}
    assert set(results) == names
    assert all(found["posts_per_s"] > 0 for found in results.values())
    for name in (peers.VLLM, peers.RUN_BATCH, peers.GENERATE, f"{peers.GENERATE} x4"):
        assert results[name]["same_labels"] >= 0.8, name
    both = results[peers.FULL]["agreement"]
    assert {(each["load"], each["metric"]) for each in both} == {
        (load, metric) for load in (OPEN, CLOSED) for metric in METRICS
    }


def test_every_sample_is_of_a_counted_round():
    arms = {name: Labels("neutral", 1.0) for name in (peers.FULL, peers.KEPT)}
    chosen = options("--block", "2", "--rounds", "3", "--warmup", "2")
    samples, _ = peers._take_turns(arms, [], {}, Posts(0, (32, 32)), chosen)
    assert len(arms[peers.FULL].blocks) == 5
    assert sorted((s.round, s.variant) for s in samples) == sorted(
        (index, name) for index in range(3) for name in arms
    )
    assert all(isinstance(sample, Sample) for sample in samples)
