"""What clients read: an answer's body, and the models and adapters there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patches.selection import SELECTORS
from serving.adapter_states import AdapterStatus, State
from serving.catalogue import Catalogue, Choices
from serving.labeler import LabelResult
from serving.protocol import Adapter, Explanation
from serving.schema import CascadeStep, ImageExplanation, LabelResponse, Retained, Usage
from serving.scoring import confidence_of


def label_response(
    request_id: str,
    result: LabelResult,
    num_patches: int,
    image_ms: float,
    steps: Sequence[tuple[float, float]] | None = None,
) -> LabelResponse:
    """The answer's body; `steps` are a cascade's ratios, and how sure each answer was."""
    settings, generated = result.settings, result.generated
    num_tokens = len(generated.token_ids)
    timing = {
        "image": image_ms,
        "queue": generated.queue_ms,
        "prefill": generated.prefill_ms,
        "decode": generated.decode_ms,
        **({} if result.explanations is None else {"explain": result.explain_ms}),
        "total": image_ms + result.total_ms,
    }
    return LabelResponse(
        id=request_id,
        model=settings.model,
        label_structure=settings.structure.name,
        labels=result.scores.labels,
        probabilities=result.scores.probabilities,
        confidence=confidence_of(result.scores.probabilities),
        retention=Retained(
            ratio=settings.retention.ratio,
            selector=settings.retention.selector,
            kept=settings.retention.num_kept(num_patches) * result.num_images,
            patches=num_patches * result.num_images,
        ),
        usage=Usage(
            prompt_tokens=generated.num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=generated.num_prompt_tokens + num_tokens,
            prompt_tokens_details={"cached_tokens": generated.num_cached_tokens},
        ),
        timing_ms={name: round(value, 3) for name, value in timing.items()},
        cascade=None
        if steps is None
        else [CascadeStep(ratio=ratio, confidence=sure) for ratio, sure in steps],
        explanations=None
        if result.explanations is None
        else [_explained(one) for one in result.explanations],
    )


def _explained(explanation: Explanation) -> ImageExplanation:
    """The body's numbers: six digits of a score are more than half precision has."""
    return ImageExplanation(
        grid=explanation.grid,
        box=tuple(round(edge, 2) for edge in explanation.box),  # type: ignore[arg-type]
        scores=[float(f"{score:.6g}") for score in explanation.scores],
        cls_attention=[float(f"{score:.6g}") for score in explanation.cls_attention],
        kept=explanation.kept,
    )


def model_cards(
    catalogue: Catalogue, statuses: Sequence[AdapterStatus] = ()
) -> list[dict[str, Any]]:
    """OpenAI's model objects, with structures, quality and an adapter's state; no paths."""
    served = {s.name: s for s in statuses if s.state in (State.LOADED, State.VERIFIED)}
    cards = []
    for name in [catalogue.base, *sorted(catalogue.adapters)]:
        settings = catalogue.resolve(Choices(model=name))
        installed = catalogue.adapters.get(name)
        structure = settings.structure
        cards.append(
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "llava-sieve",
                "parent": catalogue.base if installed else None,
                "label_structure": structure.name,
                "fields": {field: list(labels) for field, labels in structure.fields.items()},
                "prompt": structure.prompt,
                "answer": structure.answer,
                "retention_ratio": settings.retention.ratio,
                "selector": settings.retention.selector,
                "quality": installed.manifest.quality if installed else {},
                **(installed.manifest.provenance() if installed else {}),
                **(_life(served.get(name), installed.adapter) if installed else {}),
            }
        )
    return cards


def _life(status: AdapterStatus | None, adapter: Adapter) -> dict[str, Any]:
    return {
        "version": adapter.version,
        "digest": adapter.digest,
        "state": status.state if status else None,
        "pinned": status.is_pinned if status else False,
        "engines": status.num_holders if status else None,
    }


def choices_card(catalogue: Catalogue, num_patches: int) -> dict[str, Any]:
    """What a request may choose beside the model: structures, selectors; and an image's patches."""
    return {
        "label_structures": {
            name: {field: list(labels) for field, labels in structure.fields.items()}
            for name, structure in catalogue.structures.items()
        },
        "selectors": list(SELECTORS),
        "patches": num_patches,
    }


def status_card(status: AdapterStatus) -> dict[str, Any]:
    """One adapter version: where it is in its life, and why it is refused where it is."""
    return {
        "id": status.name,
        "object": "adapter",
        "version": status.version,
        "state": status.state,
        "reason": status.reason,
        "pinned": status.is_pinned,
        "engines": status.num_holders,
    }
