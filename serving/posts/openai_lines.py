"""OpenAI's batch lines: JSONL of requests to `/v1/label` or `/v1/chat/completions`.

Published with https://platform.openai.com/docs/guides/batch (the input file).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.posts.jsonl import parse_line
from serving.posts.places import Place
from serving.posts.post import DataUrl, Post
from serving.posts.reader import Found, Posts, RowError, told_id
from serving.posts.texts import decoded_lines
from serving.schema import ChatRequest, LabelRequest, RetentionFields, TextPart

_ASKS = ("model", "label_structure", "retention_ratio", "selector")
_NOT_LABELS = (
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "structured_outputs",
)
"""Fields of a chat that ask for something else than a label, or for another one."""


class Line(BaseModel):
    """A request as the file spells it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/label", "/v1/chat/completions"]
    body: dict[str, Any]


class OpenAiPosts(Posts):
    """A post a request; its id is `custom_id`, and `Post.asks` holds the model and our own fields.

    A body for `/v1/label` is that of the server. One for `/v1/chat/completions` has one message,
    the user's; its texts are joined by line ends. What only steers the writing of an answer means
    nothing to a label and is accepted without effect: `max_tokens`, `max_completion_tokens`,
    `temperature`, `top_p`, `frequency_penalty`, `presence_penalty`, `seed`, `stop`, `user`, `n` of
    1, a `response_format` of text, and `timeout_s`, as a batch has no one who waits for an answer.
    Whatever asks for something else than a label is refused. Images are data URLs.
    """

    description = "a .jsonl file of OpenAI's batch lines, with custom_id, method, url and body"

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout: its first line does."""
        if not source.is_file() or source.suffix.lower() not in (".jsonl", ".ndjson"):
            return False
        first = next((line for _, line, _ in decoded_lines(source) if line.strip()), "")
        try:
            row, _ = parse_line(first)
        except RowError:
            return '"custom_id"' in first and '"body"' in first
        names = {"method", "url", "body"}
        return isinstance(row, dict) and "custom_id" in row and not names.isdisjoint(row)

    def _found(self) -> Iterator[Found]:
        for number, line, is_odd in decoded_lines(self.source):
            if line.strip():
                self._is_odd = is_odd
                yield self._row(f"line {number}", line)

    def _row(self, where: str, line: str) -> Found:
        values = None
        try:
            values, is_cut = parse_line(line)
            self._is_odd |= is_cut
            return where, _post(Line.model_validate(values))
        except ValidationError as error:
            wrong = RowError(_explain(error))
        except RowError as error:
            wrong = error
        return where, self._unreadable(where, wrong, told_id(values, "custom_id") or None)


def _post(line: Line) -> Post:
    read = _label if line.url == "/v1/label" else _chat
    try:
        text, urls, request = read(line.body)
    except ValidationError as error:
        raise RowError(_explain(error, "body")) from error
    for url in urls:
        if not url.startswith("data:"):
            raise RowError(
                f"image {url[:80]!r} is no data URL; send the image itself as "
                "data:image/jpeg;base64,..."
            )
    asked = {name: getattr(request, name) for name in _ASKS}
    return Post(
        id=line.custom_id,
        text=text.strip(),
        images=tuple(map(DataUrl, urls)),
        asks={name: value for name, value in asked.items() if value is not None},
    )


def _label(body: dict[str, Any]) -> tuple[str, list[str], RetentionFields]:
    request = LabelRequest.model_validate(body)
    return request.text, request.images, request


def _chat(body: dict[str, Any]) -> tuple[str, list[str], RetentionFields]:
    request = ChatRequest.model_validate(body)
    roles = [message.role for message in request.messages]
    if roles != ["user"]:
        raise RowError(
            f"body.messages are of {', '.join(roles)[:80]}; a post is one message, of user"
        )
    for name in _NOT_LABELS:
        if getattr(request, name):
            raise RowError(f"body.{name} asks for something else than a label; remove it")
    if (request.n or 1) > 1:
        raise RowError(f"body.n={request.n}: a post gets one label, remove it")
    if request.response_format is not None and request.response_format.type != "text":
        raise RowError("body.response_format: the label structure gives the form; remove it")
    content = request.messages[0].content
    if isinstance(content, str):
        return content, [], request
    texts = [part.text for part in content if isinstance(part, TextPart)]
    return "\n".join(texts), request.image_urls(), request


def _explain(error: ValidationError, *before: str) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, (*before, *first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"{field!r} is unknown or not accepted; remove it"
    return f"{field}={first['input']!r:.80}: {first['msg']}" if field else "is not an object"
