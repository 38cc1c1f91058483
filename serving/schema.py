"""What clients may send and what they get: an allow-list, one field at a time.

vLLM's own chat request takes any key and dozens that reach deep into the engine. Here an unknown
field is a 400 that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from serving.errors import BadRequestError

MAX_CHOICES = 128
MAX_CHOICE_CHARS = 256
MAX_SCHEMA_CHARS = 8_000


class Strict(BaseModel):
    """A body whose unknown fields are errors, and in which `true` or "1" is no number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


Texts = Annotated[list[str], Field(fail_fast=True)]
"""A list of texts whose first bad item is complaint enough."""


class RetentionFields(Strict):
    """Fields of ours that both endpoints take."""

    retention_ratio: float | None = Field(
        None, gt=0, le=1, description="share of visual tokens kept", examples=[0.4]
    )
    selector: str | None = Field(None, description="which patches are kept", examples=["cls"])
    label_structure: str | None = Field(None, examples=["sentiment"])
    timeout_s: float | None = Field(
        None, gt=0, description="seconds until the request is given up; at most the server's"
    )


class LabelRequest(RetentionFields):
    """Body of `POST /v1/label`."""

    image: str | Texts | None = Field(
        None, description="a base64 data URL, or several; may be missing"
    )
    text: str = ""
    model: str | None = Field(None, description="the base model or an adapter")
    cascade: list[float] | None = Field(
        None,
        max_length=8,
        description="rising retention ratios; the next is asked only where an answer is not sure",
        examples=[[0.2, 1.0]],
    )
    confidence: float | None = Field(
        None, description="how sure is sure in a cascade", examples=[0.9]
    )
    explain: bool = Field(
        False, description="also answer which patches of each image were kept, and their scores"
    )

    @property
    def images(self) -> list[str]:
        """The images' data URLs."""
        if self.image is None:
            return []
        return [self.image] if isinstance(self.image, str) else self.image


class AdapterRequest(Strict):
    """Body of `POST /v1/adapters`."""

    name: str = Field(max_length=64, description="its subfolder of the adapters folder")
    version: str | None = Field(
        None, max_length=64, description="what follows '@' in the subfolder's name; else the newest"
    )
    pinned: bool | None = Field(None, description="never evicted from engines")


class Retained(BaseModel):
    """Visual tokens of a request, all of its images together."""

    ratio: float
    selector: str
    kept: int
    patches: int


class Usage(BaseModel):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ImageExplanation(BaseModel):
    """Which patches of one image were kept, and why.

    The grid is counted row by row. `box` is its left, top, right and bottom in pixels of the image
    as it was sent, turned as EXIF says: inside it where the checkpoint crops, partly outside where
    it pads.
    """

    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    scores: list[float]
    cls_attention: list[float]
    kept: list[int]


class CascadeStep(BaseModel):
    """A ratio that was asked in a cascade, and how sure its answer was."""

    ratio: float
    confidence: float


class LabelResponse(BaseModel):
    """Answer of `POST /v1/label`.

    `probabilities` are the model's over the allowed labels: a field's are conditional on the labels
    answered before it and sum to 1. `confidence` is the smallest of the winning ones. Of a cascade
    everything is the last answer's, but `timing_ms.total`, which is all of them.
    """

    id: str
    model: str
    label_structure: str
    labels: dict[str, str]
    probabilities: dict[str, dict[str, float]]
    confidence: float
    retention: Retained
    usage: Usage
    timing_ms: dict[str, float]
    cascade: list[CascadeStep] | None = None  # where asked for
    explanations: list[ImageExplanation] | None = None  # where asked for; one an image


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image of a message."""

    url: str
    detail: Literal["auto"] | None = None  # the retention ratio says how closely to look


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool = False


class StructuredOutputs(Strict):
    """vLLM's field, of which clients may use `choice`."""

    choice: list[str] = Field(min_length=1, max_length=MAX_CHOICES)

    @field_validator("choice")
    @classmethod
    def _short_enough(cls, value: list[str]) -> list[str]:
        if any(len(choice) > MAX_CHOICE_CHARS for choice in value):
            raise ValueError(f"a choice is 1 to {MAX_CHOICE_CHARS} characters")
        if sum(map(len, value)) > MAX_SCHEMA_CHARS:
            raise ValueError(f"all choices together have at most {MAX_SCHEMA_CHARS} characters")
        return value


class JsonSchema(Strict):
    """OpenAI's named JSON schema."""

    name: str = Field(max_length=64)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(RetentionFields):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=300)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=8)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[str, Field(max_length=256)] | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or not all(1 <= len(stop) <= 256 for stop in stops):
            raise ValueError("at most 16 stop strings of 1 to 256 characters")
        return value

    @property
    def text_chars(self) -> int:
        """Characters of all texts."""
        return sum(len(text) for message in self.messages for text in _texts(message))

    def image_urls(self) -> list[str]:
        """URLs of all images, in order."""
        return [
            part.image_url.url
            for message in self.messages
            if not isinstance(message.content, str)
            for part in message.content
            if isinstance(part, ImagePart)
        ]

    def engine_fields(self) -> dict[str, Any]:
        """The generation parameters that go to vLLM as they are."""
        ours = {*RetentionFields.model_fields, "messages", "structured_outputs", "user"}
        return self.model_dump(exclude=ours, exclude_none=True, by_alias=True)


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if isinstance(part, TextPart)]


def check_chat(request: ChatRequest, vocab_size: int, max_model_len: int) -> None:
    """Checks that need more than one field or the checkpoint's facts.

    Raises:
        BadRequestError: names the field, its value and what is allowed.
    """
    constraints = {
        "label_structure": request.label_structure is not None,
        "structured_outputs": request.structured_outputs is not None,
        "response_format": request.response_format is not None
        and request.response_format.type != "text",
    }
    given = [name for name, present in constraints.items() if present]
    if len(given) > 1:
        raise BadRequestError(f"{' and '.join(given)} exclude each other", param=given[1])
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, name)
        if value is not None and value > max_model_len:
            raise BadRequestError(
                f"{name}={value} is over this model's {max_model_len} tokens", param=name
            )
    _check_bias(request.logit_bias or {}, vocab_size)
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("stream_options needs stream=true", param="stream_options")
    if request.response_format is not None:
        _check_schema(request.response_format)


def _check_bias(bias: Mapping[str, float], vocab_size: int) -> None:
    for token, value in bias.items():
        if not token.isdecimal() or int(token) >= vocab_size or not -100 <= value <= 100:
            raise BadRequestError(
                f"logit_bias has {token[:20]!r}: {value}; token ids are 0 to {vocab_size - 1}, "
                "values -100 to 100",
                param="logit_bias",
            )


def _check_schema(form: ResponseFormat) -> None:
    """Cheap bounds on a JSON schema; what passes is tried out by `serving.grammar_guard`."""
    if form.type == "text":
        return
    if form.json_schema is None:
        raise _schema_error("response_format has no json_schema", None)
    schema = form.json_schema.schema_
    _check_nodes(schema)
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_CHARS:
        raise _schema_error(
            f"the JSON schema has {size} characters, allowed are {MAX_SCHEMA_CHARS}"
        )


_MAX_DEPTH, _MAX_NODES, _MAX_ALTERNATIVES, _MAX_BOUND = 12, 2_000, 64, 256
_BOUNDS = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
_REFUSED_KEYS = ("$ref", "$dynamicRef", "$recursiveRef", "pattern", "patternProperties")
_COUNTED_KEYS = {"enum": MAX_CHOICES} | dict.fromkeys(
    ("properties", "anyOf", "oneOf", "allOf", "prefixItems", "type"), _MAX_ALTERNATIVES
)
_HOLD_NAMES = ("properties", "$defs", "definitions")
_HOLD_DATA = ("enum", "const", "default", "examples")


def _check_nodes(schema: object) -> None:
    """Depth, number of values and keywords, without recursion.

    A key is a keyword, but below `properties` it is a name, and below `enum` it is data.
    """
    pending, num_nodes = [(schema, 0, "keywords")], 0
    while pending:
        node, depth, kind = pending.pop()
        num_nodes += 1
        if depth > _MAX_DEPTH or num_nodes > _MAX_NODES:
            raise _schema_error(
                f"the JSON schema is over {_MAX_DEPTH} deep or has over {_MAX_NODES} values"
            )
        if isinstance(node, dict):
            for key, value in node.items():
                if kind == "keywords":
                    _check_keyword(key, value)
                pending.append((value, depth + 1, _kind_below(key, kind)))
        elif isinstance(node, list):
            pending.extend((value, depth + 1, kind) for value in node)
        elif isinstance(node, float) and not math.isfinite(node):
            raise _schema_error("NaN or infinity in the JSON schema", None)


def _kind_below(key: str, kind: str) -> str:
    if kind == "data" or (kind == "keywords" and key in _HOLD_DATA):
        return "data"
    return "names" if kind == "keywords" and key in _HOLD_NAMES else "keywords"


def _check_keyword(key: str, value: object) -> None:
    """Refuses what lets a small schema compile for minutes."""
    if key in _REFUSED_KEYS:
        raise _schema_error(f"{key!r} in a JSON schema is not accepted; write it out, use enum")
    if key in _BOUNDS and not _is_bound(value):
        raise _schema_error(f"{key}={value!r:.40} in a JSON schema: 0 to {_MAX_BOUND} is allowed")
    allowed = _COUNTED_KEYS.get(key)
    if allowed is not None and isinstance(value, list | dict) and len(value) > allowed:
        raise _schema_error(f"{key!r} with {len(value)} values, allowed are {allowed}")


def _is_bound(value: object) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and 0 <= value <= _MAX_BOUND  # type: ignore[operator]


def _schema_error(message: str, code: str | None = "schema_too_complex") -> BadRequestError:
    return BadRequestError(message, param="response_format", code=code)
