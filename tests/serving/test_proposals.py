"""Proposed answers through the real server: the same answers in fewer passes, chats undisturbed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm.v1.metrics.reader import get_metrics_snapshot

from tests.pictures import data_url, noise
from tests.running import RunningServer

pytestmark = pytest.mark.long
TEXTS = ("a great day in the park", "a bad phone", "the new phone", "very good, very bad")


@pytest.fixture(scope="module")
def proposing_server():
    with RunningServer(dtype="float32", label_proposals=True) as server:
        yield server


def posts(num):
    models = ("llavac", "sentiment", "demo")
    for number in range(num):
        yield {
            "model": models[number % 3],
            "label_structure": "sentiment" if models[number % 3] == "sentiment" else "llavac",
            "text": f"{TEXTS[number % 4]} {number}",
            "image": data_url(noise(seed=number % 7)),
            "retention_ratio": (1.0, 0.4)[number % 2],
        }


def sampled(number):
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": f"{TEXTS[number % 4]} {number}"}],
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": number,
        "max_tokens": 12,
    }


def count(name):
    """A counter of the engine that this process started last: vLLM's metrics are a process's."""
    return sum(metric.value for metric in get_metrics_snapshot() if metric.name == name)


def answers(server, num_chats=0):
    """Labels of all posts, eight at a time, beside so many sampled chats."""
    with ThreadPoolExecutor(8) as pool:
        labels = [pool.submit(server.label, **post) for post in posts(60)]
        chats = [
            pool.submit(server.post, "/v1/chat/completions", sampled(number))
            for number in range(num_chats)
        ]
        texts = [chat.result().json()["choices"][0]["message"]["content"] for chat in chats]
        return [label.result() for label in labels], texts


def test_answers_are_the_same_and_most_proposals_are_taken(proposing_server, demo_server):
    ours, our_chats = answers(proposing_server, num_chats=12)
    expected, chats = answers(demo_server, num_chats=12)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine["labels"] == theirs["labels"]
        for field, shares in theirs["probabilities"].items():
            assert mine["probabilities"][field] == pytest.approx(shares, abs=1e-4)
    assert our_chats == chats
    taken = count("vllm:spec_decode_num_accepted_tokens")
    assert taken > count("vllm:spec_decode_num_draft_tokens") / 2 > 0


def test_an_answer_of_three_labels_takes_fewer_passes(proposing_server):
    """Five without proposals; with them the first, and one or two that check the rest."""
    name = "vllm:spec_decode_num_drafts"
    before = count(name)
    labels = [proposing_server.label(**post) for post in posts(30) if post["model"] == "llavac"]
    assert len(labels) == 10
    assert 10 <= count(name) - before <= 20
