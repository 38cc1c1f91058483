"""What `python -m bench batch` sends, compares and says; nothing here starts an engine."""

import json
from types import SimpleNamespace

import pytest

from bench import batch, batch_limit, batch_peer, contest
from bench.__main__ import build_parser
from bench.batch_peer import OURS, THEIRS, Race
from bench.outcome import BenchError
from bench.statistics import Sample
from serving.batch.options import BatchOptions
from serving.batch.outcomes import Failure
from serving.posts import read_posts
from serving.schema import ChatRequest
from serving.settings import DEMO, Settings


def options(*argv):
    return build_parser().parse_args(["batch", *argv])


@pytest.fixture
def posts(tmp_path):
    return list(read_posts(batch_limit.write_posts(tmp_path / "made", 6, 0, (64, 48))))


def written(folder, name):
    return [json.loads(line) for line in (folder / name).open()]


def test_both_get_the_same_posts_and_images(posts, tmp_path):
    batch_peer.write_inputs(posts, tmp_path, Settings(), "sentiment")
    ours, theirs = written(tmp_path, "ours.jsonl"), written(tmp_path, "theirs.jsonl")
    assert [row["id"] for row in ours] == [row["custom_id"] for row in theirs]
    for row, request in zip(ours, theirs, strict=True):
        image, prompt = request["body"]["messages"][0]["content"]
        assert image["image_url"]["url"] == row["image"]
        assert row["text"] in prompt["text"]
    assert len({row["image"] for row in ours}) == len(posts)
    read = list(read_posts(tmp_path / "ours.jsonl"))
    assert [p.images[0].read_bytes() for p in read] == [p.images[0].read_bytes() for p in posts]


def test_their_request_is_a_chat_whose_answer_is_one_of_our_labels(posts, tmp_path):
    batch_peer.write_inputs(posts[:1], tmp_path, Settings(), "sentiment")
    (request,) = written(tmp_path, "theirs.jsonl")
    body = request["body"]
    assert body.pop("add_special_tokens") in (True, False)
    ChatRequest.model_validate({**body, "label_structure": None})
    (labels,) = batch_peer.STRUCTURE.fields.values()
    assert body["structured_outputs"] == {"choice": [f" {label}" for label in labels]}
    assert body["model"] == "sentiment"


def test_their_engine_has_the_same_adapters_and_no_plugin(monkeypatch, tmp_path):
    seen = {}

    def timed(arguments, log, environment):
        seen.update(arguments=arguments, environment=environment)
        (tmp_path / "vllm.jsonl").write_text("")
        return 3.0, 2.0

    monkeypatch.setattr(batch_peer, "_timed", timed)
    settings = Settings(model=str(DEMO / "base"))
    race = batch_peer.race_theirs(tmp_path, "vllm", settings, 2)
    assert (race.whole_s, race.label_s, race.labels) == (3.0, 2.0, {})
    assert seen["environment"]["VLLM_PLUGINS"] == ""
    assert any(argument.startswith("sentiment=") for argument in seen["arguments"])
    assert set(contest.engine_arguments(settings)) <= set(seen["arguments"])


def test_a_process_is_timed_whole_and_from_the_first_sight_of_its_bar_to_the_last(tmp_path):
    code = "import time; time.sleep(.2); print('Running batch: 0', flush=True); time.sleep(.3); "
    code += "print('Running batch: 9', flush=True); time.sleep(.2)"
    whole_s, label_s = batch_peer._timed(["-c", code], tmp_path / "log", {})
    assert 0 < label_s < whole_s - 0.3
    assert "Running batch: 9" in (tmp_path / "log").read_text()


def test_a_process_that_fails_names_its_log(tmp_path):
    with pytest.raises(BenchError, match=r"status 7.*log"):
        batch_peer._timed(["-c", "raise SystemExit(7)"], tmp_path / "log", {})


def test_the_limit_is_what_share_of_the_engines_rate_an_arm_has():
    seconds = {"batch": 2.0, "labeler": 1.25, "engine": 1.0}
    samples = [
        Sample(round=index, variant=arm, seconds=s * (1 + index))
        for arm, s in seconds.items()
        for index in range(3)
    ]
    outcome = batch.summarise_limit(samples, options("--block", "100"))
    assert outcome.results["batch"]["ratio"]["median"] == pytest.approx(0.5)
    assert outcome.results["batch"]["rate"] == pytest.approx(100 / 4.0)
    assert [row[-1] for row in outcome.rows] == [">= 0.9: no", "", ""]


def test_the_peer_is_compared_by_time_of_labelling_and_by_labels():
    ids = [str(i) for i in range(10)]
    fast = Race(whole_s=12.0, label_s=2.0, labels=dict.fromkeys(ids, "positive"))
    slow = Race(
        whole_s=13.0,
        label_s=3.0,
        labels={**dict.fromkeys(ids, "positive"), "0": "negative"},
        num_decoded=30,
    )
    found = {f"{OURS} 1.0": [fast, fast], THEIRS: [slow, slow]}
    outcome = batch.summarise_peer(found, 10, options())
    ours = outcome.results[f"{OURS} 1.0"]
    assert ours["ratio"]["median"] == pytest.approx(1.5)
    assert ours["whole"]["median"] == pytest.approx(13 / 12)
    assert (ours["rate"], ours["same"]) == (pytest.approx(5.0), 9)
    assert outcome.rows[0][-1] == ">= 1.2: yes"
    assert any("3.0 tokens a post" in note for note in outcome.notes)


def test_too_few_posts_with_one_image_are_told(posts, tmp_path):
    batch_peer.write_inputs(posts, tmp_path, Settings(), "sentiment")
    assert len(batch.readable(tmp_path / "ours.jsonl", 6)) == 6
    with pytest.raises(BenchError, match="6 posts with one image, --posts is 7"):
        batch.readable(tmp_path / "ours.jsonl", 7)


async def test_a_block_of_the_limit_counts_only_posts_that_can_be_labelled(posts):
    class Preparer:
        async def prepare(self, chunk):
            return [Failure("decode", "broken", code="x") for _ in chunk]

    plan = SimpleNamespace(options=BatchOptions(data="x", out="y"))
    arms = batch_limit.Arms(plan, Preparer(), SimpleNamespace(labeler=None), 4)
    with pytest.raises(BenchError, match="0 of 4 posts"):
        await arms.time("labeler", iter(posts))


async def test_requests_rendered_ahead_are_found_and_the_renderer_is_as_before_after():
    calls = []

    class Renderer:
        async def render_cmpl_async(self, prompts):
            calls.append(prompts)
            return [{"rendered": prompts[0]["prompt_token_ids"]}]

    engine = SimpleNamespace(_llm=SimpleNamespace(renderer=Renderer()))
    requests = [SimpleNamespace(prompt_ids=[i], images=[], cache_salt=None) for i in range(3)]
    async with batch_limit.rendered_ahead(engine, requests):
        assert len(calls) == 3
        (found,) = await engine._llm.renderer.render_cmpl_async(
            [{"prompt_token_ids": requests[1].prompt_ids}]
        )
        assert found == {"rendered": [1]}
        assert len(calls) == 3
    await engine._llm.renderer.render_cmpl_async([{"prompt_token_ids": [9]}])
    assert len(calls) == 4
