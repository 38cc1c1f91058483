"""Predictions over HTTP: what is sent, what is retried, and that they equal Hugging Face's."""

import base64
import json
import threading
import time

import httpx
import pytest

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.posts import Post
from serving.retries import Retries
from serving.settings import DEMO
from serving.structures import SENTIMENTS, STRUCTURES, make_structure
from train.demo.dataset import demo_posts
from train.evaluated import LocalModel
from train.evaluation import Plan, choose_posts, evaluate
from train.report.figures import summarize
from train.served import ServedModel

QUICK = Retries(num_tries=4, base_s=0.001, most_s=0.002)
FIELDS = {"image": SENTIMENTS, "text": SENTIMENTS, "multimodal": SENTIMENTS}
CARDS = [
    {
        "id": "base",
        "parent": None,
        "label_structure": "sentiment",
        "fields": {"sentiment": SENTIMENTS},
        "prompt": STRUCTURES["sentiment"].prompt,
    },
    {
        "id": "mine",
        "parent": "base",
        "label_structure": "llavac",
        "fields": FIELDS,
        "prompt": STRUCTURES["llavac"].prompt,
    },
]
POST = Post(id="p1", text="hello", images=(b"bytes of an image",))


def answer(body):
    shares = {"positive": 0.7, "neutral": 0.2, "negative": 0.1}
    num_images = len(body.get("image", []))
    return {
        "id": "label-1",
        "model": body["model"],
        "label_structure": body["label_structure"],
        "labels": dict.fromkeys(FIELDS, "positive"),
        "probabilities": dict.fromkeys(FIELDS, shares),
        "confidence": max(shares.values()),
        "retention": {
            "ratio": body["retention_ratio"],
            "selector": body["selector"],
            "kept": 26 * num_images,
            "patches": 64 * num_images,
        },
        "usage": {
            "prompt_tokens": 40,
            "completion_tokens": 5,
            "total_tokens": 45,
            "prompt_tokens_details": {},
        },
        "timing_ms": {},
    }


class Stub:
    """A server whose answers to posts are `replies` in turn, then labels."""

    def __init__(self, *replies):
        self.replies, self.bodies, self.in_flight, self.most_in_flight = list(replies), [], 0, 0
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": CARDS})
        body = json.loads(request.content)
        with self._lock:
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            reply = self.replies.pop(0) if self.replies else None
        time.sleep(0.005)
        with self._lock:
            self.in_flight -= 1
        if isinstance(reply, Exception):
            raise reply
        return reply or httpx.Response(200, json=answer(body))

    def model(self, name="mine", **options) -> ServedModel:
        options = {"patience": QUICK, "transport": httpx.MockTransport(self), **options}
        return ServedModel("http://stub/v1/", name, **options)


def label(model, posts=(POST,), ratio=0.4):
    return model.label(posts, ratio=ratio, selector="cls", title="t")


def test_a_post_is_sent_with_its_own_bytes_and_read_as_a_prediction():
    stub = Stub()
    (found,) = label(stub.model())
    (body,) = stub.bodies
    assert base64.b64decode(body["image"][0].partition(",")[2]) == b"bytes of an image"
    assert (body["text"], body["model"], body["label_structure"]) == ("hello", "mine", "llavac")
    assert (body["retention_ratio"], body["selector"]) == (0.4, "cls")
    assert found.id == "p1"
    assert found.labels["multimodal"] == "positive"
    assert found.probabilities["image"]["neutral"] == 0.2
    assert (found.kept, found.patches) == (26, 64)


def test_a_post_without_image_is_sent_without():
    stub = Stub()
    (found,) = label(stub.model(), [Post(id="1", text="words")])
    assert "image" not in stub.bodies[0]
    assert found.patches == 0


def test_answers_keep_the_order_and_few_requests_are_in_flight():
    stub = Stub()
    posts = [Post(id=str(i), text=f"{i}") for i in range(40)]
    found = label(stub.model(concurrency=3), posts)
    assert [one.id for one in found] == [post.id for post in posts]
    assert 1 < stub.most_in_flight <= 3


@pytest.mark.parametrize("reply", [httpx.Response(429), httpx.Response(503), httpx.ReadError("x")])
def test_a_busy_server_is_asked_again(reply):
    stub = Stub(reply, reply)
    assert len(label(stub.model())) == 1
    assert len(stub.bodies) == 3


def test_the_wait_is_what_the_server_asks_for_within_reason():
    patience = Retries(base_s=0.1, most_s=1.0, most_asked_s=30.0)
    assert 0.1 <= patience.wait_s(1, None) <= 0.125
    assert 1.0 <= patience.wait_s(9, None) <= 1.25
    assert 7.0 <= patience.wait_s(1, "7") <= 8.75
    assert patience.wait_s(1, "9999") <= 37.5
    assert patience.wait_s(1, "Wed, 21 Oct 2015 07:28:00 GMT") <= 0.125
    assert patience.wait_s(1, "soon") <= 0.125


def test_a_server_that_stays_busy_ends_the_run_with_its_words():
    error = {"error": {"message": "queue is full"}}
    stub = Stub(*[httpx.Response(503, json=error)] * 9)
    with pytest.raises(ConfigError, match="'p1'.*503.*queue is full"):
        label(stub.model())
    assert len(stub.bodies) == QUICK.num_tries


def test_a_refused_post_is_named_and_not_tried_again():
    error = {"error": {"message": "image is not a readable image"}}
    stub = Stub(httpx.Response(400, json=error))
    with pytest.raises(ConfigError, match="'p1'.*400.*not a readable image"):
        label(stub.model())
    assert len(stub.bodies) == 1


def test_a_lost_connection_is_an_error_that_names_the_server():
    stub = Stub(*[httpx.ConnectError("refused")] * 9)
    with pytest.raises(ConfigError, match="'http://stub' is lost.*4 tries"):
        label(stub.model())


def test_an_image_file_that_is_gone_is_named(tmp_path):
    post = Post(id="gone", images=(tmp_path / "no.jpg",))
    with pytest.raises(ConfigError, match="'gone'.*--skip-broken"):
        label(Stub().model(), [post])


def test_an_answer_of_something_else_is_refused():
    stub = Stub(httpx.Response(200, json={"hello": "world"}))
    with pytest.raises(ConfigError, match="'p1'.*none of LLaVA Sieve"):
        label(stub.model())


def test_a_structure_of_the_same_name_with_other_labels_is_refused():
    own = make_structure("llavac", {"fields": {"mood": ["good", "bad"]}, "prompt": "{text}"})
    with pytest.raises(ConfigError, match="'llavac' has other fields.*'mood'"):
        label(Stub().model(structure=own))


def test_structure_and_base_come_from_the_servers_own_card():
    model = Stub().model()
    assert model.structure == STRUCTURES["llavac"]
    base = model.without_adapter()
    assert base.name == "base"
    assert base.structure == STRUCTURES["llavac"]
    assert base.without_adapter() is None
    assert Stub().model(None).name == "base"


def test_a_model_that_is_not_served_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"--model 'other'.*\['base', 'mine'\]"):
        Stub().model("other")


def test_a_server_of_another_kind_is_refused():
    transport = httpx.MockTransport(lambda request: httpx.Response(404, text="nope"))
    with pytest.raises(ConfigError, match="/v1/models.*404"):
        ServedModel("http://stub", transport=transport)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "", "http://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="is not a URL"):
        ServedModel(url)


def test_no_server_at_all_is_an_error_with_the_fix():
    with pytest.raises(ConfigError, match="cannot be reached.*is it running"):
        ServedModel("http://127.0.0.1:9")


@pytest.fixture(scope="module")
def posts():
    return list(demo_posts(32, seed=11))


@pytest.fixture(scope="module")
def local():
    return LocalModel(STRUCTURES["llavac"], DEMO / "base", DEMO / "adapters" / "llavac")


@pytest.fixture(scope="module")
def served(demo_server):
    model = ServedModel(demo_server.url, "llavac")
    yield model
    model.close()


def assert_equal(here, there):
    for one, other in zip(here, there, strict=True):
        assert one.id == other.id
        assert one.labels == other.labels
        assert (one.kept, one.patches) == (other.kept, other.patches)
        for field, shares in one.probabilities.items():
            assert other.probabilities[field] == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "selector"), [(1.0, "cls"), *((0.4, selector) for selector in SELECTORS)]
)
def test_the_server_answers_as_hugging_face_does(local, served, posts, ratio, selector):
    here = local.label(posts, ratio=ratio, selector=selector, title="here")
    there = served.label(posts, ratio=ratio, selector=selector, title="there")
    assert_equal(here, there)


def test_the_base_and_posts_without_image_or_text_are_answered_alike(local, served, posts):
    text_only = [Post(id=post.id, text=post.text) for post in posts[:8]]
    image_only = [Post(id=post.id, images=post.images) for post in posts[:8]]
    several = [Post(id="2", text="two", images=posts[0].images + posts[1].images)]
    for some in (text_only, image_only, several):
        assert_equal(
            local.label(some, ratio=1.0, selector="cls", title="here"),
            served.label(some, ratio=1.0, selector="cls", title="there"),
        )
    assert_equal(
        local.without_adapter().label(posts[:8], ratio=1.0, selector="cls", title="here"),
        served.without_adapter().label(posts[:8], ratio=1.0, selector="cls", title="there"),
    )


def test_both_ways_give_the_same_report(local, served, posts):
    train = list(demo_posts(60, split="train", seed=12))
    train = [Post(id=f"t{post.id}", text=post.text, labels=post.labels) for post in train]
    plan = Plan(ratios=(1.0, 0.4), selectors=("cls",), num_resamples=200)
    chosen = choose_posts(STRUCTURES["llavac"], posts)
    here, there = (
        summarize(evaluate(model, chosen, train=train, plan=plan)) for model in (local, served)
    )
    assert without_probabilities(here) == without_probabilities(there)


def without_probabilities(value):
    """A report but for what follows from probabilities, which agree to 1e-4 only."""
    if isinstance(value, dict):
        dropped = ("ece", "reliability")
        return {k: without_probabilities(v) for k, v in value.items() if k not in dropped}
    return [without_probabilities(one) for one in value] if isinstance(value, list) else value
