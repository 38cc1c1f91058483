"""What became of one post, as it is journalled and published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serving.errors import SieveError

Stage = Literal["read", "decode", "prompt", "label"]


class Failure(Exception):
    """Why a post has no labels.

    Args:
        stage: `read` (its row or files), `decode` (its images), `prompt` (what it asks for, or its
            length), `label` (the engine).
        reason: for people.
        code: for machines.
        can_retry: whether the same post may be labelled another time.
    """

    def __init__(self, stage: Stage, reason: str, *, code: str, can_retry: bool = False) -> None:
        super().__init__(reason)
        self.stage, self.reason, self.code, self.can_retry = stage, reason, code, can_retry

    def __reduce__(self) -> tuple[Any, ...]:
        """Crosses from worker processes."""
        return _failure, (self.stage, self.reason, self.code, self.can_retry)

    @classmethod
    def of(cls, stage: Stage, error: SieveError) -> Failure:
        """A server's error about one post."""
        return cls(
            stage,
            error.message,
            code=error.code or error.type,
            can_retry=error.status in (429, 503),
        )

    def as_dict(self) -> dict[str, Any]:
        """A row of the errors' file, without the id."""
        return {
            "stage": self.stage,
            "code": self.code,
            "reason": self.reason,
            "retryable": self.can_retry,
        }


def _failure(stage: Stage, reason: str, code: str, can_retry: bool) -> Failure:
    return Failure(stage, reason, code=code, can_retry=can_retry)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One model's labels of a post.

    Attributes:
        model: the adapter, or the base model.
        version: the adapter's contents, as a digest; empty for the base model.
        labels: by field.
        probabilities: by field and label, each field's sum to 1.
        confidence: the smallest among the winning labels' probabilities.
        ratio: retention ratio of this answer; in a cascade the last one that was asked.
        selector: which patches were kept.
        kept: visual tokens kept, of all images.
        visual_tokens: those of every ratio that was asked; as many as `kept` without a cascade.
        patches: visual tokens before selection.
        num_asked: ratios of the cascade that were asked; 1 without one.
    """

    model: str
    version: str
    labels: Mapping[str, str]
    probabilities: Mapping[str, Mapping[str, float]]
    confidence: float
    ratio: float
    selector: str
    kept: int
    visual_tokens: int
    patches: int
    num_asked: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a post.

    Attributes:
        index: its place in the input, from 0.
        id: of the post.
        answers: one a model, in the order asked for; empty where it failed.
        error: why it failed, see `Failure.as_dict`.
        known: labels that were known before, by field.
        review: text and image names, where somebody should look at it.
        is_repeat: whether its answers are those of an equal post before it.
    """

    index: int
    id: str
    answers: tuple[Answer, ...] = ()
    error: Mapping[str, Any] | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    review: Mapping[str, Any] | None = None
    is_repeat: bool = False

    def to_line(self) -> str:
        """A line of the journal."""
        values = {**vars(self), "answers": [vars(answer) for answer in self.answers]}
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Outcome:
        """What `to_line` wrote."""
        values = json.loads(line)
        values["answers"] = tuple(Answer(**answer) for answer in values["answers"])
        return cls(**values)
