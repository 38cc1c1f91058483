"""From a prepared post to its answers: all models asked for, cascades, equal posts once."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from patches.selection import num_kept
from serving.batch.outcomes import Answer, Failure
from serving.batch.prepare import Prepared
from serving.cascade import Cascade, Climbed, climb
from serving.catalogue import Choices
from serving.errors import BadRequestError, EngineDeadError, SieveError
from serving.labeler import Labeler
from serving.posts import Post
from serving.scoring import confidence_of

REMEMBERED = 20_000
"""Answers kept for equal posts that may follow; some 40 MB."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of every post, unless its own row says otherwise.

    Attributes:
        models: adapters, or the base model; empty for the server's default.
        choices: structure, ratio and selector.
        cascade: ratios in turn, or None.
        max_text_chars: longest text.
        is_fixed: whether a row may not ask for other models or structures, as columns are fixed.
    """

    models: tuple[str, ...]
    choices: Choices
    cascade: Cascade | None
    max_text_chars: int
    is_fixed: bool

    def of(self, post: Post) -> list[tuple[Choices, Cascade | None]]:
        """The requests that one post comes to.

        Raises:
            Failure: its row asks for what it may not.
        """
        own = dict(post.asks)
        fixed = [name for name in ("model", "label_structure") if self.is_fixed and name in own]
        if fixed:
            raise Failure(
                "prompt",
                f"the row asks for {fixed[0]}={own[fixed[0]]!r}, but columns are the same for all "
                "rows in CSV and Parquet; use --format jsonl",
                code="fixed_columns",
            )
        models: tuple[str | None, ...] = self.models or (None,)
        if "model" in own:
            models = (own.pop("model"),)
        choices = replace(self.choices, **own)
        cascade = None if "retention_ratio" in own else self.cascade
        return [(replace(choices, model=model), cascade) for model in models]


class Answerer:
    """Answers posts through whatever labeler it is given; remembers recent ones.

    Args:
        asked: of every post.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self._recent: OrderedDict[tuple[bytes, str, str], asyncio.Future[tuple[Answer, ...]]]
        self._recent = OrderedDict()

    async def answer(
        self, labeler: Labeler, post: Post, prepared: Prepared
    ) -> tuple[tuple[Answer, ...], bool]:
        """A post's answers, and whether an equal post had them already.

        Raises:
            Failure: the post cannot be labelled.
            EngineDeadError: the engine is gone.
        """
        key = (prepared.key, post.text, json.dumps(dict(post.asks), sort_keys=True))
        while (known := self._recent.get(key)) is not None:
            self._recent.move_to_end(key)
            try:
                return await asyncio.shield(known), True
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not known.done() or (task is not None and task.cancelling()):
                    raise  # not only the equal post's question came to nothing
        answer = asyncio.get_running_loop().create_future()
        self._recent[key] = answer
        while len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)
        try:
            answer.set_result(await self._ask(labeler, post, prepared))
        except BaseException:
            if self._recent.get(key) is answer:
                del self._recent[key]
            answer.cancel()
            raise
        return answer.result(), False

    async def _ask(self, labeler: Labeler, post: Post, prepared: Prepared) -> tuple[Answer, ...]:
        self._check(post)
        images = prepared.pictures()
        answers = []
        for choices, cascade in self.asked.of(post):
            try:
                answers.append(await _answer(labeler, post.text, images, choices, cascade))
            except EngineDeadError:
                raise
            except BadRequestError as error:
                raise Failure.of("prompt", error) from error
            except SieveError as error:
                raise Failure.of("prompt" if error.status == 404 else "label", error) from error
        return tuple(answers)

    def _check(self, post: Post) -> None:
        if not post.text and not post.images:
            raise Failure("prompt", "the post has neither text nor image", code="empty_post")
        if len(post.text) > self.asked.max_text_chars:
            raise Failure(
                "prompt",
                f"text has {len(post.text)} characters, allowed are {self.asked.max_text_chars}",
                code="text_too_long",
            )


async def _answer(
    labeler: Labeler,
    text: str,
    images: Sequence[Image.Image],
    choices: Choices,
    cascade: Cascade | None,
) -> Answer:
    request_id = f"batch-{uuid.uuid4().hex}"
    climbed = await climb(labeler, text, list(images), choices, cascade, request_id)
    return read_answer(labeler, climbed)


def read_answer(labeler: Labeler, climbed: Climbed) -> Answer:
    """What a batch keeps of a labelled post."""
    result, settings = climbed.result, climbed.result.settings
    num_patches = labeler.engine.info.num_patches
    kept = settings.retention.num_kept(num_patches) * result.num_images
    ratios = [ratio for ratio, _ in climbed.steps or ()]
    seen = sum(num_kept(num_patches, ratio) for ratio in ratios) * result.num_images
    shares: dict[str, Any] = {
        field: {label: round(share, 6) for label, share in labels.items()}
        for field, labels in result.scores.probabilities.items()
    }
    return Answer(
        model=settings.model,
        version=settings.adapter.digest[:12] if settings.adapter else "",
        labels=dict(result.scores.labels),
        probabilities=shares,
        confidence=round(confidence_of(result.scores.probabilities), 6),
        ratio=settings.retention.ratio,
        selector=settings.retention.selector,
        kept=kept,
        visual_tokens=seen if ratios else kept,
        patches=num_patches * result.num_images,
        num_asked=climbed.num_asked,
    )
