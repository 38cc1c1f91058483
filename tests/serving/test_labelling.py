"""Labelling runs: order, bounds, retries, errors as rows, summaries; no engine is started."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from serving.catalogue import Choices
from serving.errors import ConfigError, EngineDeadError, SieveError
from serving.images import ImageDecoder, ImageLimits
from serving.labeler import Labeler
from serving.labelling import LabelOptions, label_posts, run_label
from serving.posts import Post
from serving.retries import Retries
from serving.senders import EngineSender, HttpSender
from serving.structures import SENTIMENTS
from serving.summary import Quality, Result
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_app import make_app
from tests.serving.test_labeler import catalogue

LIMITS = ImageLimits(max_bytes=1000)
QUICK = Retries(num_tries=4, base_s=0.001, most_s=0.002)
SHARES = {"positive": 0.7, "neutral": 0.2, "negative": 0.1}


def answer(label: str = "positive", *, patches: int = 576) -> dict[str, Any]:
    return {
        "id": "label-1",
        "model": "base",
        "label_structure": "sentiment",
        "labels": {"sentiment": label},
        "probabilities": {"sentiment": SHARES},
        "confidence": max(SHARES.values()),
        "retention": {
            "ratio": 0.4,
            "selector": "cls",
            "kept": patches * 2 // 5,
            "patches": patches,
        },
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 2,
            "total_tokens": 102,
            "prompt_tokens_details": {},
        },
        "timing_ms": {},
    }


def posts(count: int) -> Iterator[Post]:
    return (Post(id=str(number), text=f"post {number}") for number in range(count))


class Stub:
    """A server whose answers are those of `replies` in turn, then labels."""

    def __init__(self, *replies: Response | Exception) -> None:
        self.replies, self.bodies = list(replies), []  # type: ignore[var-annotated]
        self.transport = httpx.ASGITransport(self._app())

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/label", response_model=None)
        async def label(request: Request) -> Response | dict[str, Any]:
            self.bodies.append(await request.json())
            reply = self.replies.pop(0) if self.replies else answer()
            if isinstance(reply, Exception):
                raise reply
            return reply

        return app

    def sender(self, choices: Choices | None = None, **options: Any) -> HttpSender:
        options = {"retries": QUICK, "transport": self.transport, **options}
        return HttpSender("http://stub", choices or Choices(), **options)


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> Response:
    body = {"error": {"message": message, "type": "some_error", "param": "text", "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status_code=status, headers=named)


async def collect(
    source: Iterator[Post], send: Any, concurrency: int = 4
) -> tuple[Any, list[Result]]:
    results: list[Result] = []
    summary = await label_posts(source, send, concurrency=concurrency, on_result=results.append)
    return summary, results


@pytest.mark.parametrize("concurrency", [1, 3, 16])
async def test_results_keep_the_order_and_few_posts_are_in_flight(concurrency: int) -> None:
    in_flight = most_sent = most_read = done = 0

    def read() -> Iterator[Post]:
        nonlocal most_read
        for number, post in enumerate(posts(60)):
            most_read = max(most_read, number + 1 - done)
            yield post

    async def send(post: Post) -> dict[str, Any]:
        nonlocal in_flight, most_sent
        in_flight += 1
        most_sent = max(most_sent, in_flight)
        await asyncio.sleep(random.Random(post.id).random() / 200)
        in_flight -= 1
        return answer()

    ids: list[str] = []

    def on_result(result: Result) -> None:
        nonlocal done
        done += 1
        ids.append(result.post.id)

    await label_posts(read(), send, concurrency=concurrency, on_result=on_result)
    assert ids == [str(number) for number in range(60)]
    assert most_sent == concurrency
    assert most_read <= 2 * concurrency


async def test_results_come_while_later_posts_are_still_read() -> None:
    seen: list[int] = []
    results: list[Result] = []

    def read() -> Iterator[Post]:
        for post in posts(20):
            seen.append(len(results))
            yield post

    async def send(post: Post) -> dict[str, Any]:
        return answer()

    await label_posts(read(), send, concurrency=2, on_result=results.append)
    assert seen[-1] >= 16


async def test_a_failing_post_becomes_its_result_and_the_run_goes_on() -> None:
    async def send(post: Post) -> dict[str, Any]:
        if int(post.id) % 3 == 0:
            raise SieveError("bad post", code="invalid_image")
        return answer()

    summary, results = await collect(posts(10), send)
    assert [result.error is not None for result in results] == [n % 3 == 0 for n in range(10)]
    assert (summary.posts, summary.labelled, summary.failed) == (10, 6, {"invalid_image": 4})
    assert "first post '0': bad post" in str(summary)


async def test_a_post_with_nothing_in_it_fails_alone() -> None:
    stub = Stub()
    summary, _ = await collect(iter([Post(id="a"), Post(id="b", text="b")]), stub.sender())
    assert summary.failed == {"empty_post": 1}
    assert len(stub.bodies) == 1


@pytest.mark.parametrize("error", [ConfigError("gone"), EngineDeadError("gone")])
async def test_what_no_later_post_survives_stops_the_run(error: SieveError) -> None:
    running: set[str] = set()

    async def send(post: Post) -> dict[str, Any]:
        if post.id == "2":
            raise error
        running.add(post.id)
        try:
            await asyncio.sleep(0 if post.id in "01" else 60)
        finally:
            running.discard(post.id)
        return answer()

    with pytest.raises(type(error), match="gone"):
        await collect(posts(50), send)
    assert not running


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_is_tried_again(status: int) -> None:
    stub = Stub(failure(status), failure(status))
    summary, _ = await collect(posts(1), stub.sender())
    assert summary.labelled == 1
    assert len(stub.bodies) == 3


async def test_a_broken_connection_is_tried_again() -> None:
    stub = Stub(httpx.ReadError("reset"), httpx.ConnectError("refused"))
    summary, _ = await collect(posts(1), stub.sender())
    assert summary.labelled == 1


async def test_tries_are_bounded_and_the_last_error_is_the_servers() -> None:
    stub = Stub(*(failure(503, "full", "overloaded") for _ in range(9)))
    summary, results = await collect(posts(1), stub.sender())
    assert len(stub.bodies) == QUICK.num_tries
    assert summary.failed == {"overloaded": 1}
    assert results[0].error is not None
    assert results[0].error.message == "full"


async def test_a_server_lost_for_good_stops_the_run() -> None:
    stub = Stub(*(httpx.ConnectError("refused") for _ in range(1000)))
    with pytest.raises(ConfigError, match=r"is lost.*refused.*8 posts in a row"):
        await collect(posts(100), stub.sender(concurrency=4))


@pytest.mark.parametrize("status", [400, 404, 413, 422, 500])
async def test_other_errors_are_not_tried_again_and_keep_what_the_server_said(status: int) -> None:
    stub = Stub(failure(status, "why", "some_code"))
    _, (result,) = await collect(posts(1), stub.sender())
    assert len(stub.bodies) == 1
    error = result.error
    assert error is not None
    assert error.status == status
    assert error.body()["error"] == {
        "message": "why",
        "type": "some_error",
        "param": "text",
        "code": "some_code",
    }


@pytest.mark.parametrize(
    "reply",
    [
        Response("<html>Bad gateway", status_code=502),
        Response("<html>Welcome"),
        JSONResponse({"labels": {}}),
        JSONResponse([1]),
        JSONResponse({"error": "text"}, status_code=400),
    ],
)
async def test_what_is_no_answer_of_ours_is_an_error_with_what_came(reply: Response) -> None:
    _, (result,) = await collect(posts(1), Stub(reply).sender())
    assert result.error is not None
    assert result.error.code == "not_an_answer"
    assert f"HTTP {reply.status_code}" in result.error.message


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("2", 2, 2.5),
        ("0", 0.25, 0.32),
        (None, 0.25, 0.32),
        ("soon", 0.25, 0.32),
        ("99999", 60, 75),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 60, 75),
        ("Fri, 01 Jan 2010 00:00:00 GMT", 0.25, 0.32),
    ],
)
def test_the_wait_is_at_least_what_the_server_asks_within_reason(
    asked: str | None, least: float, most: float
) -> None:
    assert least <= Retries().wait_s(1, asked) <= most


def test_waits_double_up_to_a_cap() -> None:
    waits = [Retries().wait_s(tried) for tried in range(1, 9)]
    assert all(0.25 * 2**n <= wait <= 0.25 * 2**n * 1.25 for n, wait in enumerate(waits[:6]))
    assert all(8 <= wait <= 10 for wait in waits[5:])


async def test_retry_after_of_a_reply_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    here, sleeps = asyncio.get_running_loop(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        if asyncio.get_running_loop() is not here:  # a server of another test, in its thread
            await sleeps(seconds)
            return
        waited.append(seconds)

    monkeypatch.setattr("serving.senders.asyncio.sleep", sleep)
    await Stub(failure(503, retry_after="3")).sender()(Post(id="a", text="a"))
    assert len(waited) == 1
    assert 3 <= waited[0] <= 3.75


async def test_a_request_holds_text_images_and_only_the_choices_made(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"on disk")
    stub = Stub()
    send = stub.sender(Choices(model="m", retention_ratio=0.4))
    await send(Post(id="a", text="hé", images=(tmp_path / "a.jpg", b"inline")))
    await send(Post(id="b", text="b"))
    with_images, without = stub.bodies
    images = [base64.b64decode(url.partition(",")[2]) for url in with_images.pop("image")]
    assert images == [b"on disk", b"inline"]
    assert with_images == {"text": "hé", "model": "m", "retention_ratio": 0.4}
    assert without == {"text": "b", "model": "m", "retention_ratio": 0.4}


@pytest.mark.parametrize("name", ["absent.jpg", "nul\0.jpg", "half\ud83d.jpg", ""])
async def test_an_image_that_cannot_be_read_fails_its_post_without_its_path(
    name: str, tmp_path: Path
) -> None:
    post = Post(id="a", images=(tmp_path / name,))
    summary, (result,) = await collect(iter([post]), Stub().sender())
    assert summary.failed == {"image_unreadable": 1}
    assert result.error is not None
    assert str(tmp_path.parent) not in result.error.message


@pytest.mark.parametrize("server", ["http://stub/", "http://stub/v1", "http://stub/v1/"])
async def test_the_url_may_end_in_v1(server: str) -> None:
    stub = Stub()
    await HttpSender(server, Choices(), transport=stub.transport)(Post(id="a", text="a"))
    assert len(stub.bodies) == 1


@pytest.mark.parametrize("server", ["127.0.0.1:8000", "ftp://a", "", "http://", "http://a:b"])
def test_what_is_no_url_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        HttpSender(server, Choices())


async def test_the_first_answer_tells_the_fields_and_a_refusal_is_the_runs() -> None:
    stub = Stub(failure(503), JSONResponse(answer()), failure(404, "no such model"))
    sender = stub.sender()
    assert await sender.fields() == {"sentiment": list(SENTIMENTS)}
    with pytest.raises(SieveError, match="no such model"):
        await sender.fields()


@pytest.fixture
def labeler(published_tokenizer: Any) -> Labeler:
    return Labeler(FakeEngine(), catalogue(), published_tokenizer)


def engine_sender(labeler: Labeler, choices: Choices | None = None) -> EngineSender:
    return EngineSender(labeler, ImageDecoder(LIMITS), choices or Choices(), max_text_chars=20)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "choices", [Choices(), Choices(label_structure="llavac", retention_ratio=0.25)]
)
async def test_the_engine_here_answers_as_its_server_does(
    choices: Choices, labeler: Labeler
) -> None:
    app = make_app(labeler, max_text_chars=20)
    over_http = HttpSender("http://app", choices, transport=httpx.ASGITransport(app))
    here = engine_sender(labeler, choices)
    assert await here.fields() == await over_http.fields()
    for images in ((), (png(),), (png(), png())):
        post = Post(id="a", text="a", images=images)
        answers = [await here(post), await over_http(post)]
        for response in answers:
            del response["id"], response["timing_ms"]
        assert answers[0] == answers[1]
        assert answers[0]["retention"]["patches"] == 64 * len(images)


@pytest.mark.parametrize(
    ("post", "reason"),
    [
        (Post(id="a", text="x" * 21), "text has 21 characters"),
        (Post(id="a", images=(b"x" * 1001,)), "image has 1001 bytes"),
        (Post(id="a", images=(b"x",)), "not a readable image"),
        (Post(id="a", images=(b"x",) * 5), "5 images, allowed are 4"),
        (Post(id="a", images=(Path("absent.jpg"),)), "'absent.jpg' cannot be read"),
    ],
)
async def test_the_engine_here_keeps_the_servers_limits(
    post: Post, reason: str, labeler: Labeler
) -> None:
    _, (result,) = await collect(iter([post]), engine_sender(labeler))
    assert result.error is not None
    assert reason in result.error.message


async def test_a_dead_engine_stops_the_run(labeler: Labeler) -> None:
    labeler.engine.is_dead = True  # type: ignore[attr-defined]
    with pytest.raises(EngineDeadError):
        await collect(posts(3), engine_sender(labeler))


async def test_choices_that_the_engine_has_not_are_refused_at_the_start(labeler: Labeler) -> None:
    with pytest.raises(SieveError, match="'absent' does not exist"):
        await engine_sender(labeler, Choices(model="absent")).fields()


@pytest.mark.parametrize("seed", range(8))
def test_quality_is_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(seed)
    labels = SENTIMENTS[: 1 + seed % 3]
    known = draw.choices(labels, k=1 + 5 * seed)
    given = draw.choices((*labels, "other"), k=len(known))
    pairs: dict[tuple[str, str], int] = {}
    for pair in zip(known, given, strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    quality = Quality.of(pairs)
    assert quality.num_known == len(known)
    assert quality.accuracy == pytest.approx(metrics.accuracy_score(known, given))
    assert quality.macro_f1 == pytest.approx(
        metrics.f1_score(known, given, average="macro", zero_division=0)
    )


async def test_the_summary_counts_labels_quality_and_cost() -> None:
    known = ["positive", "negative", None, "positive"]
    given = ["positive", "positive", "neutral", "negative"]
    source = (
        Post(id=str(n), text="a", labels={"sentiment": label} if label else {"other": "x"})
        for n, label in enumerate(known)
    )

    async def send(post: Post) -> dict[str, Any]:
        return answer(given[int(post.id)], patches=576 if post.id != "2" else 0)

    summary, _ = await collect(source, send)
    assert summary.distribution == {"sentiment": {"positive": 2, "neutral": 1, "negative": 1}}
    assert set(summary.quality) == {"sentiment"}
    assert summary.quality["sentiment"].num_known == 3
    assert summary.quality["sentiment"].accuracy == pytest.approx(1 / 3)
    assert (summary.mean_kept, summary.mean_patches) == (230, 576)
    assert summary.mean_prompt_tokens == 100
    machine = json.loads(json.dumps(summary.as_dict()))
    assert machine["posts_per_s"] == pytest.approx(4 / summary.wall_s)
    assert machine["quality"]["sentiment"]["num_known"] == 3


async def test_a_run_without_posts_has_a_summary() -> None:
    summary, _ = await collect(posts(0), Stub().sender())
    assert str(summary).startswith("0 of 0 posts labelled")
    assert summary.as_dict()["mean_kept"] is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four posts: one labelled, one not UTF-8, one refused, one without its image."""
    path = tmp_path / "posts.jsonl"
    path.write_bytes(
        b'{"id": "a", "text": "good", "labels": {"sentiment": "positive"}}\n'
        b'{"id": "b", "text": "caf\xe9"}\n'
        b'{"id": "c", "text": "refused"}\n'
        b'{"id": "d", "image": "absent.jpg"}\n'
    )
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> str:
    """A stub server that refuses some posts, in place of the network."""

    def reply(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["text"] == "refused":
            error = {"message": "refused, with a comma", "type": "t", "param": None, "code": "no"}
            return httpx.Response(400, json={"error": error})
        return httpx.Response(200, json=answer())

    make = httpx.AsyncClient
    transport = httpx.MockTransport(reply)
    monkeypatch.setattr(
        "serving.senders.httpx.AsyncClient",
        lambda **options: make(**{**options, "transport": transport}),
    )
    return "http://stub"


async def test_a_run_writes_full_rows_and_both_summaries(
    data: Path, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, machine = tmp_path / "new" / "out.jsonl", tmp_path / "summary.json"
    options = LabelOptions(data=data, server=server, out=out, summary_json=machine)
    assert await run_label(options, None) == 3
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    for row in rows[:2]:
        assert set(row) == {"id", "labels", "probabilities", "model", "retention", "usage"}
    assert rows[2]["error"]["message"] == "refused, with a comma"
    assert rows[3]["error"]["code"] == "image_unreadable"
    counted = json.loads(machine.read_text(encoding="utf-8"))
    assert counted["failed"] == {"no": 1, "image_unreadable": 1}
    assert counted["num_not_utf8"] == 1
    printed = capsys.readouterr()
    assert "2 of 4 posts labelled" in printed.out
    assert printed.err == ""  # no bar where stderr is not a terminal


async def test_a_csv_has_a_column_a_field_and_a_label(
    data: Path, server: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    await run_label(LabelOptions(data=data, server=server, out=out), None)
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [f"sentiment.{label}" for label in SENTIMENTS]
    assert list(rows[0]) == ["id", "sentiment", *columns, "error"]
    assert rows[0]["sentiment"] == "positive"
    assert [float(rows[0][column]) for column in columns] == [SHARES[name] for name in SENTIMENTS]
    assert rows[2]["sentiment"] == rows[2]["sentiment.positive"] == ""
    assert rows[2]["error"] == "refused, with a comma"


@pytest.mark.parametrize("out", [None, Path("-")])
async def test_a_run_without_output_only_prints(
    out: Path | None, data: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = LabelOptions(data=data, server=server, out=out, limit=2)
    assert await run_label(options, None) == 0
    assert list(tmp_path.iterdir()) == [data]


async def test_ids_that_are_not_unicode_are_written_as_escapes(server: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "posts", tmp_path / "out.jsonl"
    folder.mkdir()
    try:
        (folder / "caf\udce9.txt").write_text("a")
    except (OSError, UnicodeError):
        pytest.skip("this file system has Unicode names only")
    await run_label(LabelOptions(data=folder, server=server, out=out), None)
    assert json.loads(out.read_text(encoding="utf-8"))["id"] == "caf\udce9"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"limit": 0}, "limit=0"),
        ({"retention": 0.0}, "retention=0.0"),
        ({"retention": float("nan")}, "retention=nan"),
        ({"out": Path("a.parquet")}, ".jsonl and .csv"),
        ({"out": Path("posts.jsonl")}, "is the data itself"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_starts(
    wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        LabelOptions(**{"data": Path("posts.jsonl"), **wrong})
    assert says in caught.value.message


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def test_a_server_that_cannot_be_reached_stops_the_run_before_it_writes(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("of an earlier run")
    server = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(ConfigError, match="cannot be reached.*is it running"):
        await run_label(LabelOptions(data=data, server=server, out=out), None)
    assert out.read_text() == "of an earlier run"


async def test_an_output_that_cannot_be_written_is_said(data: Path, server: str) -> None:
    options = LabelOptions(data=data, server=server, out=data / "out.csv")
    with pytest.raises(ConfigError, match="cannot be written"):
        await run_label(options, None)
