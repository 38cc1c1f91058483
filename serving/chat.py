"""An admitted chat request as a call of the engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from serving.catalogue import Choices, Resolved
from serving.constraint import pattern_of
from serving.errors import BadRequestError
from serving.keys import salt_of_caller
from serving.labeler import Labeler
from serving.prompts import as_plain_text
from serving.protocol import ChatCall
from serving.schema import ChatRequest, ImagePart, Message


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """What a chat asks for, found out before any of its images is looked at.

    Attributes:
        settings: model and retention.
        pattern: constraint of a label structure or of choices, or None.
    """

    settings: Resolved
    pattern: str | None


def plan_chat(request: ChatRequest, labeler: Labeler) -> ChatPlan:
    """Resolves settings and constraint of a chat.

    Raises:
        SieveError: unknown model, structure or selector.
    """
    settings = labeler.catalogue.resolve(
        Choices(
            model=request.model,
            label_structure=request.label_structure,
            retention_ratio=request.retention_ratio,
            selector=request.selector,
        )
    )
    return ChatPlan(settings=settings, pattern=_pattern(request, settings, labeler))


def build_call(
    request: ChatRequest, plan: ChatPlan, images: list[Image.Image], tokenizer: Any
) -> ChatCall:
    """The call of the engine; messages keep the client's own words.

    Under a label structure the likeliest answer is given unless the request sets a temperature.
    """
    decoded = iter(images)
    body: dict[str, Any] = request.engine_fields()
    body["messages"] = [_message(message, decoded, tokenizer) for message in request.messages]
    if request.label_structure is not None:
        body.setdefault("temperature", 0.0)
    return ChatCall(
        request_id=uuid.uuid4().hex,
        body=body,
        retention=plan.settings.retention,
        adapter=plan.settings.adapter,
        pattern=plan.pattern,
        num_images=len(images),
        cache_salt=salt_of_caller(),
    )


def _message(message: Message, images: Iterator[Image.Image], tokenizer: Any) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": as_plain_text(tokenizer, message.content)}
    parts: list[dict[str, Any]] = [
        {"image_pil": next(images)}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": as_plain_text(tokenizer, part.text)}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _pattern(request: ChatRequest, settings: Resolved, labeler: Labeler) -> str | None:
    """The constraint of a label structure or of a client's choices, in canonical ids."""
    if request.label_structure is not None:
        return labeler.constraint_of(settings.structure).pattern
    if request.structured_outputs is None:
        return None
    choices = request.structured_outputs.choice
    for choice in choices:
        if not choice.strip() or len(choice) > 256:
            raise BadRequestError(
                f"structured_outputs.choice has {choice[:40]!r}; a choice is 1 to 256 characters",
                param="structured_outputs",
            )
    _check_no_special_tokens(choices, labeler.tokenizer)
    return pattern_of([labeler.answer_ids(choice) for choice in dict.fromkeys(choices)])


def _check_no_special_tokens(choices: list[str], tokenizer: Any) -> None:
    for choice in choices:
        for token in tokenizer.all_special_tokens:
            if token in choice:
                raise BadRequestError(
                    f"structured_outputs.choice has {choice[:40]!r}, and {token!r} is a token of "
                    "the model that cannot be answered; leave it out",
                    param="structured_outputs",
                )
