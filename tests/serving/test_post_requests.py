"""OpenAI's batch lines: what a request says of its post, and what of it is refused."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from serving.errors import BadRequestError, ConfigError
from serving.posts import DataUrl, Post, Unreadable, check_post, read_posts
from serving.schema import ChatRequest

URL = "data:image/png;base64," + base64.b64encode(b"inline").decode()
LABEL, CHAT = "/v1/label", "/v1/chat/completions"


def line(id_: object, body: object, url: str = LABEL, **more: object) -> dict[str, object]:
    return {"custom_id": id_, "method": "POST", "url": url, "body": body, **more}


def chat(content: object, **more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def entries(folder: Path, *rows: object) -> list[Post | Unreadable]:
    path = folder / "batch.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return list(read_posts(path).entries())


def test_a_label_request_is_a_post_with_what_it_asks_for(tmp_path: Path) -> None:
    asks = {"model": "m", "label_structure": "llavac", "retention_ratio": 0.4, "selector": "cls"}
    bare, full = entries(
        tmp_path,
        line("a", {"text": " hi "}),
        line("b", {"text": "ho", "image": [URL, URL], "timeout_s": 3, **asks}),
    )
    assert bare == Post(id="a", text="hi")
    assert full == Post(id="b", text="ho", images=(DataUrl(URL), DataUrl(URL)), asks=asks)
    assert pickle.loads(pickle.dumps(full)) == full


def test_a_chat_is_a_post_of_its_texts_and_images(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "text", "text": "two"},
    ]
    plain, full = entries(
        tmp_path,
        line("a", chat("hi"), CHAT),
        line("b", chat(parts, label_structure="sentiment", max_tokens=4), CHAT),
    )
    assert plain == Post(id="a", text="hi", asks={"model": "m"})
    assert isinstance(full, Post)
    assert (full.text, full.image_bytes()) == ("one\ntwo", [b"inline"])
    assert full.asks == {"model": "m", "label_structure": "sentiment"}


IGNORED: dict[str, Any] = {
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.5,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "seed": 1,
    "stop": ["x"],
    "user": "u",
    "n": 1,
    "response_format": {"type": "text"},
    "timeout_s": 1,
    "stream": False,
}
REFUSED: dict[str, Any] = {
    "n": 2,
    "response_format": {"type": "json_schema"},
    "logit_bias": {"1": 2},
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {},
    "structured_outputs": {"choice": ["a"]},
}


def test_every_field_of_a_chat_is_asked_for_ignored_or_refused(tmp_path: Path) -> None:
    asked = {"model", "messages", "label_structure", "retention_ratio", "selector"}
    assert {*ChatRequest.model_fields} == asked | {*IGNORED} | {*REFUSED}
    posts = entries(tmp_path, line("all", chat("a", **IGNORED), CHAT))
    assert posts == [Post(id="all", text="a", asks={"model": "m"})]
    rows = [line(name, chat("a", **{name: value}), CHAT) for name, value in REFUSED.items()]
    for entry in entries(tmp_path, *rows):
        assert isinstance(entry, Unreadable)
        assert f"body.{entry.id}" in entry.message


@pytest.mark.parametrize(
    ("row", "id_", "says"),
    [
        ("{oops", "line 2", "line 2: '{oops' is not a JSON object"),
        ("[1]", "line 2", "not an object"),
        (line(5, {}), "5", "custom_id=5"),
        (line("", {}), "line 2", "custom_id=''"),
        (line("b", {}, method="GET"), "b", "method='GET'"),
        (line("b", {}, "/v1/embeddings"), "b", "url='/v1/embeddings'"),
        (line("b", {}, extra=1), "b", "'extra' is unknown"),
        (line("b", {"text": "a", "tools": []}), "b", "'body.tools' is unknown"),
        (line("b", {"text": 5}), "b", "body.text=5"),
        (line("b", {"text": "a", "retention_ratio": 2}), "b", "body.retention_ratio=2"),
        (line("b", {"image": "https://e.org/a.jpg"}), "b", "is no data URL"),
        (line("b", chat("a", tools=[]), CHAT), "b", "'body.tools'"),
        (
            line("b", {"model": "m", "messages": [{"role": "system", "content": "a"}]}, CHAT),
            "b",
            "body.messages are of system; a post is one message, of user",
        ),
        (
            line("b", {"model": "m", "messages": chat("a")["messages"] * 2}, CHAT),  # type: ignore[operator]
            "b",
            "are of user, user",
        ),
    ],
)
def test_a_wrong_request_is_unreadable_under_its_id(
    row: object, id_: str, says: str, tmp_path: Path
) -> None:
    first, wrong, last = entries(tmp_path, line("a", {}), row, line("z", {"text": "a"}))
    assert (first.id, last) == ("a", Post(id="z", text="a"))
    assert isinstance(wrong, Unreadable)
    assert wrong.id == id_
    assert says in wrong.message


def test_a_first_line_that_is_broken_does_not_change_the_layout(tmp_path: Path) -> None:
    broken, post = entries(tmp_path, json.dumps(line("a", {}))[:-1], line("b", {"text": "a"}))
    assert isinstance(broken, Unreadable)
    assert post == Post(id="b", text="a")


def test_rows_of_the_users_own_may_call_their_id_custom_id(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"custom_id": "a", "text": "hi"}\n')
    assert list(read_posts(path, fields={"id": "custom_id"})) == [Post(id="a", text="hi")]
    with pytest.raises(ConfigError, match="'custom_id' is unknown; allowed are id"):
        list(read_posts(path))


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,*", "data:image/png,abc", "data:image/png;base64"]
)
def test_a_data_url_that_is_not_base64_is_said_when_its_bytes_are_asked_for(
    url: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"image": url}))
    (post,) = read_posts(path)
    with pytest.raises(BadRequestError, match="base64"):
        post.image_bytes()
    (_, fault) = check_post(post).faults
    assert fault.kind == "broken_image"
    assert "base64" in fault.detail


def test_an_image_within_its_row_is_no_longer_than_the_row_until_it_is_read() -> None:
    image = DataUrl(URL)
    assert (image.name, image.read_bytes()) == ("data URL", b"inline")
    assert pickle.loads(pickle.dumps(image)) == image
    assert URL not in repr(image)
    assert len({image, DataUrl(URL)}) == 1
