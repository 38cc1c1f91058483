"""A low retention ratio first, a higher one only where the answer is not sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from serving.catalogue import Choices
from serving.errors import BadRequestError
from serving.labeler import Labeler, LabelResult
from serving.scoring import confidence_of

MOST_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Ratios to ask one after the other, until an answer is as sure as `confidence`.

    Raises:
        BadRequestError: not two to four rising ratios, or a bar outside (0, 1].
    """

    ratios: tuple[float, ...]
    confidence: float

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.ratios, self.ratios[1:], strict=False))
        inside = all(math.isfinite(ratio) and 0 < ratio <= 1 for ratio in self.ratios)
        if not (2 <= len(self.ratios) <= MOST_STEPS and rising and inside):
            raise BadRequestError(
                f"cascade={list(self.ratios)}: 2 to {MOST_STEPS} rising ratios in (0, 1] are "
                "allowed, e.g. [0.2, 1.0]",
                param="cascade",
            )
        if not 0 < self.confidence <= 1:
            raise BadRequestError(
                f"confidence={self.confidence} must be above 0 and up to 1, e.g. 0.9",
                param="confidence",
            )

    @classmethod
    def asked(
        cls, ratios: Sequence[float] | None, confidence: float | None, ratio: float | None
    ) -> Cascade | None:
        """What a request says; None where it asks for no cascade.

        Raises:
            BadRequestError: half of one, one beside a single ratio, or one that is not allowed.
        """
        if ratios is None and confidence is None:
            return None
        if ratios is None or confidence is None:
            param = "cascade" if ratios is None else "confidence"
            raise BadRequestError(
                "cascade and confidence come together, e.g. cascade=[0.2, 1.0] and confidence=0.9; "
                f"{param} is missing",
                param=param,
            )
        if ratio is not None:
            raise BadRequestError(
                "cascade and retention_ratio exclude each other", param="retention_ratio"
            )
        return cls(ratios=tuple(ratios), confidence=confidence)


@dataclass(frozen=True, kw_only=True)
class Climbed:
    """The last answer of a cascade, and how sure each was that was asked for.

    Attributes:
        result: the answer to give.
        steps: `(ratio, confidence)` of every ratio asked, in order; None without a cascade.
    """

    result: LabelResult
    steps: tuple[tuple[float, float], ...] | None

    @property
    def num_asked(self) -> int:
        """How many ratios were asked."""
        return 1 if self.steps is None else len(self.steps)


async def climb(
    labeler: Labeler,
    text: str,
    images: list[Image.Image],
    choices: Choices,
    cascade: Cascade | None,
    request_id: str,
    *,
    explain: bool = False,
) -> Climbed:
    """Labels a post at each ratio in turn until the answer is sure enough.

    A post without images costs the same at every ratio and is asked once, at the last.

    Args:
        labeler: answers.
        text: of the post.
        images: of the post.
        choices: what else is asked for; their ratio is replaced.
        cascade: ratios and bar, or None to ask once.
        request_id: unique; each step adds its number.
        explain: whether answers also say which patches they kept.

    Raises:
        SieveError: the request cannot be served.
    """
    if cascade is None:
        result = await labeler.label(text, images, choices, request_id, explain=explain)
        return Climbed(result=result, steps=None)
    steps: list[tuple[float, float]] = []
    total_ms = 0.0
    for ratio in cascade.ratios if images else cascade.ratios[-1:]:
        result = await labeler.label(
            text,
            images,
            replace(choices, retention_ratio=ratio),
            f"{request_id}-{len(steps)}",
            explain=explain,
            is_further=bool(steps),
        )
        total_ms += result.total_ms
        steps.append((ratio, confidence_of(result.scores.probabilities)))
        if steps[-1][1] >= cascade.confidence:
            break
    return Climbed(result=replace(result, total_ms=total_ms), steps=tuple(steps))
