"""How well adapters label: accuracy and macro-F1 at each retention ratio and selector.

Hugging Face only, on top of `train.reference`: whatever the server does to be fast cannot make
these figures better. Letters as in `train/reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from patches.selection import SELECTORS, num_kept
from serving.prompts import encode, render_prompt
from serving.structures import LabelStructure
from train.answers import allowed_answers, decode
from train.reference import Reference, Seen

RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
SELECTOR_NAMES = tuple(SELECTORS)
BATCH_SIZE = 50

Quality = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LabeledPosts:
    """A test set in memory, one image a post.

    Attributes:
        pixel_values: `(N, 3, H, W)` as the checkpoint's processor gives them.
        texts: N texts.
        labels: N labels by field name.
        masks: `(N, P)` bool, the patches that hold the signal, where it is known.
    """

    pixel_values: Tensor
    texts: Sequence[str]
    labels: Sequence[Mapping[str, str]]
    masks: Tensor | None = None


def see_posts(reference: Reference, posts: LabeledPosts) -> Seen:
    """What the tower makes of all images; once, whatever is kept of them later."""
    parts = [reference.see(pixels) for pixels in posts.pixel_values.split(BATCH_SIZE)]
    return Seen(
        features=torch.cat([part.features for part in parts]),
        cls_attention=torch.cat([part.cls_attention for part in parts]),
    )


@torch.inference_mode()
def answer_posts(
    reference: Reference,
    structure: LabelStructure,
    texts: Sequence[str],
    seen: Seen | None,
    *,
    ratio: float = 1.0,
    selector: str = "cls",
) -> list[dict[str, str]]:
    """The adapter's labels for each post, under the label constraint.

    Args:
        reference: checkpoint and adapter.
        structure: what is asked.
        texts: the posts' texts.
        seen: the posts' images, or None to ask without an image.
        ratio: retention ratio.
        selector: the selector; `random` is seeded by the post's place in the set.
    """
    answers = allowed_answers(reference.tokenizer, structure)
    found: list[dict[str, str]] = []
    for batch in _batches(len(texts)):
        prompts = []
        for index in batch:
            kept = [] if seen is None else [_keep(reference, seen, index, ratio, selector)]
            prompt = render_prompt(reference.tokenizer, structure, texts[index], len(kept))
            prompts.append(reference.embed(encode(reference.tokenizer, prompt), kept))
        found += decode(reference.llava, prompts, answers)
    return found


def measure(
    structure: LabelStructure,
    found: Sequence[Mapping[str, str]],
    labels: Sequence[Mapping[str, str]],
) -> Quality:
    """Accuracy and macro-F1 of the last field, which is the merged label, and each field's."""
    quality: Quality = {}
    for field, allowed in structure.fields.items():
        guessed, true = [item[field] for item in found], [item[field] for item in labels]
        accuracy = float(accuracy_score(true, guessed))
        f1 = float(f1_score(true, guessed, labels=list(allowed), average="macro", zero_division=0))
        quality |= {"accuracy": round(accuracy, 4), "macro_f1": round(f1, 4)}
        if len(structure.fields) > 1:
            quality[f"{field}_accuracy"] = round(accuracy, 4)
    return quality


def sweep(
    reference: Reference,
    structure: LabelStructure,
    posts: LabeledPosts,
    *,
    ratios: Sequence[float] = RATIOS,
    selectors: Sequence[str] = SELECTOR_NAMES,
) -> Iterator[tuple[str, float, Quality]]:
    """Quality at each selector and ratio; at ratio 1.0 every selector keeps the same patches."""
    seen = see_posts(reference, posts)
    whole: Quality | None = None
    for selector in selectors:
        for ratio in ratios:
            if ratio == 1.0 and whole is not None:
                yield selector, ratio, whole
                continue
            found = answer_posts(
                reference, structure, posts.texts, seen, ratio=ratio, selector=selector
            )
            quality = measure(structure, found, posts.labels)
            whole = quality if ratio == 1.0 else whole
            yield selector, ratio, quality


def one_sided(
    reference: Reference, structure: LabelStructure, posts: LabeledPosts
) -> dict[str, Quality]:
    """Quality when the text or the image is missing, or is another post's."""
    seen, count = see_posts(reference, posts), len(posts.texts)
    others = torch.arange(count).roll(1)
    other_images = Seen(features=seen.features[others], cls_attention=seen.cls_attention[others])
    cases = {
        "text only": (posts.texts, None),
        "text only, image of another post": (posts.texts, other_images),
        "image only": ([""] * count, seen),
        "image only, text of another post": ([posts.texts[i] for i in others], seen),
    }
    return {
        name: measure(structure, answer_posts(reference, structure, texts, images), posts.labels)
        for name, (texts, images) in cases.items()
    }


def attention_on_signal(seen: Seen, masks: Tensor, feature_layer: int) -> dict[str, float]:
    """Where [CLS] looks: its attention's share on the signal, and how much of that is kept.

    Recall at a ratio is the share of signal patches among the K kept, of those K could hold.
    """
    shares = (seen.cls_attention * masks[:, None]).sum(-1) / seen.cls_attention.sum(-1)
    figures = {f"share, layer {i + 1}": float(v) for i, v in enumerate(shares.mean(0))}
    scores = {
        "cls": seen.cls_attention.mean(dim=1),
        "cls-last": seen.cls_attention[:, feature_layer],
    }
    mean = scores["cls"]
    figures["share, mean"] = float(((mean * masks).sum(-1) / mean.sum(-1)).mean())
    figures["share, uniform"] = float(masks.float().mean())
    for selector, score in scores.items():
        for ratio in RATIOS[1:]:
            kept = num_kept(masks.shape[1], ratio)
            held = masks.gather(1, score.topk(kept).indices).sum(-1)
            recall = held / masks.sum(-1).clamp(max=kept)
            figures[f"recall, {selector} {ratio:g}"] = float(recall.mean())
    return {name: round(value, 4) for name, value in figures.items()}


def _keep(reference: Reference, seen: Seen, index: int, ratio: float, selector: str) -> Tensor:
    kept = reference.keep(seen, index, ratio=ratio, selector=selector, seed=index)
    return seen.features[index, kept]


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH_SIZE):
        yield range(start, min(start + BATCH_SIZE, count))
