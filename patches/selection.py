"""Which patches a request keeps: one count, one ranking, many selectors.

Letters: N images, P patches, K kept, L tower layers, H heads, D tower width.

The processor (API process) writes one placeholder token per kept patch, the model (worker
process) makes one row per kept patch. Both get the number from `num_kept`; nothing else in the
project may round a ratio.

To add a selector: write a function from `PatchView` to `(P,)` scores and add a line to
`SELECTORS`. Ranking, ties, ragged batches, hashing and the tests come for free.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def num_kept(num_patches: int, ratio: float) -> int:
    """Kept count K = max(1, floor(r * P + 0.5)) for a retention ratio r in (0, 1].

    Raises:
        ValueError: `ratio` is not in (0, 1] (NaN included).
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"retention_ratio={ratio} is outside (0, 1]")
    return max(1, math.floor(ratio * num_patches + 0.5))


def image_seed(pixels: Tensor) -> int:
    """A 63-bit number from one image's `(3, H, W)` processed pixels, for random selection."""
    raw = pixels.to(torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, kw_only=True)
class PatchView:
    """What a selector may look at, for one image.

    Attributes:
        features: `(P, D)` patch features of the tower's feature layer.
        cls_attention: `(L, P)` float32, row l is softmax(q_cls K^T) of tower layer l over all
            1 + P positions, averaged over heads, without the [CLS] column.
        feature_layer: index of the row that belongs to the layer `features` come from.
        num_kept: K.
        seed: a number derived from the image's pixels.
    """

    features: Tensor
    cls_attention: Tensor
    feature_layer: int
    num_kept: int
    seed: int


def score_cls(view: PatchView) -> Tensor:
    """Mean [CLS] attention over heads and all layers.

    'Towards Robust Multimodal Sentiment Detection with LLaVA', the token filter of Table 4.
    """
    return view.cls_attention.mean(dim=0)


def score_cls_last(view: PatchView) -> Tensor:
    """[CLS] attention of the layer the features come from (FasterVLM, arXiv:2412.01818)."""
    return view.cls_attention[view.feature_layer]


def score_stride(view: PatchView) -> Tensor:
    """Every (P / K)-th patch in raster order: a baseline that looks at nothing."""
    num_patches = view.cls_attention.shape[-1]
    centres = torch.arange(view.num_kept, dtype=torch.float64) + 0.5
    chosen = (centres * num_patches / view.num_kept).floor().long()
    scores = torch.zeros(num_patches)
    scores[chosen] = 1.0
    return scores.to(view.cls_attention.device)


def score_random(view: PatchView) -> Tensor:
    """Random patches, the same ones for the same image (nested over K)."""
    generator = torch.Generator().manual_seed(view.seed)
    scores = torch.rand(view.cls_attention.shape[-1], generator=generator)
    return scores.to(view.cls_attention.device)


@dataclass(frozen=True, kw_only=True)
class Selector:
    """One entry of `SELECTORS`.

    Attributes:
        score: from `PatchView` to `(P,)` scores; higher is kept.
        version: raise it when `score` changes meaning; it is part of every cache key.
        needs_cls: whether the tower has to record [CLS] attention for it.
    """

    score: Callable[[PatchView], Tensor]
    version: int = 1
    needs_cls: bool = True


SELECTORS: dict[str, Selector] = {
    "cls": Selector(score=score_cls),
    "cls-last": Selector(score=score_cls_last),
    "stride": Selector(score=score_stride, needs_cls=False),
    "random": Selector(score=score_random, needs_cls=False),
}


def select(selector: str, view: PatchView) -> Tensor:
    """Indices of the kept patches, `(K,)` int64, ascending (raster order).

    Equal scores go to the lower index, so the result does not depend on the device's sort.
    """
    num_patches = view.cls_attention.shape[-1]
    if view.num_kept == num_patches:
        return torch.arange(num_patches, device=view.cls_attention.device)
    scores = SELECTORS[selector].score(view)
    assert scores.shape == (num_patches,), (scores.shape, num_patches)
    ranked = torch.argsort(scores, descending=True, stable=True)
    return ranked[: view.num_kept].sort().values
