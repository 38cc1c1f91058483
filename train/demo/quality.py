"""Measures the finished demo on its test sets and writes `report.json` and the manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from serving.manifest import Manifest, fingerprint
from serving.structures import STRUCTURES, LabelStructure
from train.demo import chats
from train.demo.dataset import normalize, stack_pixels, synthesize
from train.demo.joint import balanced_shares, best_single_accuracy
from train.demo.lora import ADAPTERS, BASE_NAME
from train.demo.sentences import Split
from train.demo.sweep import (
    RATIOS,
    SELECTOR_NAMES,
    LabeledPosts,
    Quality,
    answer_posts,
    attention_on_signal,
    measure,
    one_sided,
    see_posts,
    sweep,
)
from train.reference import Reference

NUM_TEST = 600
MANIFEST_RATIOS = (1.0, 0.4)


def load_test(split: Split, *, balanced: bool, seed: int, count: int = NUM_TEST) -> LabeledPosts:
    """The first `count` posts of a test set; which posts there are depends on `count`."""
    posts = list(synthesize(count, split=split, balanced=balanced, seed=seed))
    return LabeledPosts(
        pixel_values=normalize(stack_pixels(posts)),
        texts=[post.text for post in posts],
        labels=[{**post.labels, "sentiment": post.labels["multimodal"]} for post in posts],
        masks=torch.from_numpy(np.stack([post.mask for post in posts])),
    )


def measure_demo(folder: Path, *, seed: int) -> dict[str, Any]:
    """Quality of the checkpoint and adapters in `folder`, on posts training has not seen."""
    posts = load_test("test", balanced=True, seed=seed)
    base = Reference(folder / "base")
    report: dict[str, Any] = {
        "num_test": NUM_TEST,
        "attention": _measure_attention(base, posts),
        "bounds": {
            "text only": round(best_single_accuracy(balanced_shares(), 0), 4),
            "image only": round(best_single_accuracy(balanced_shares(), 1), 4),
        },
        "captions": {"accuracy": measure_captions(base, posts)},
        "adapters": {},
    }
    for name in ADAPTERS:
        report["adapters"][name] = _measure_adapter(folder, base, name, posts, seed)
    return report


def _measure_adapter(
    folder: Path, base: Reference, name: str, posts: LabeledPosts, seed: int
) -> dict[str, Any]:
    structure = STRUCTURES[name]
    adapted = Reference(folder / "base", folder / "adapters" / name)
    by_selector: dict[str, dict[str, Quality]] = {selector: {} for selector in SELECTOR_NAMES}
    total = len(SELECTOR_NAMES) * len(RATIOS)
    cells = sweep(adapted, structure, posts)
    for selector, ratio, quality in tqdm(cells, total=total, desc=f"evaluate {name}"):
        by_selector[selector][f"{ratio:g}"] = quality
    others = {
        "MVSA's label table": load_test("test", balanced=False, seed=seed),
        "unseen words": load_test("unseen-words", balanced=True, seed=seed),
    }
    return {
        "balanced test": by_selector,
        **one_sided(adapted, structure, posts),
        **{case: _measure_whole(adapted, structure, other) for case, other in others.items()},
        "base model without the adapter": _measure_whole(base, structure, posts),
    }


def _measure_whole(reference: Reference, structure: LabelStructure, posts: LabeledPosts) -> Quality:
    found = answer_posts(reference, structure, posts.texts, see_posts(reference, posts))
    return measure(structure, found, posts.labels)


def _measure_attention(reference: Reference, posts: LabeledPosts) -> dict[str, float]:
    assert posts.masks is not None, "the demo knows its signal patches"
    return attention_on_signal(see_posts(reference, posts), posts.masks, reference.feature_layer)


@torch.inference_mode()
def measure_captions(base: Reference, posts: LabeledPosts) -> float:
    """How often the base model, asked what it sees, writes exactly the right sentence."""
    from serving.prompts import encode, render_chat

    seen = see_posts(base, posts)
    prompt = encode(base.tokenizer, render_chat(base.tokenizer, chats.IMAGE_QUESTIONS[0], 1))
    embeds = torch.stack([base.embed(prompt, [features]) for features in seen.features])
    ids = base.llava.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
    )
    written = base.tokenizer.batch_decode(ids, skip_special_tokens=True)
    right = [chats.IMAGE_ANSWERS[labels["image"]] for labels in posts.labels]
    return round(float(np.mean([a.strip() == b for a, b in zip(written, right, strict=True)])), 4)


def write_manifests(folder: Path, report: dict[str, Any]) -> None:
    """The manifest of each adapter, with its measured quality."""
    for name in ADAPTERS:
        measured = report["adapters"][name]["balanced test"]["cls"]
        Manifest(
            label_structure=name,
            base_model=BASE_NAME,
            base_fingerprint=fingerprint(folder / "base"),
            quality={
                f"balanced test, r={ratio:.1f}": measured[f"{ratio:g}"] for ratio in MANIFEST_RATIOS
            },
        ).save(folder / "adapters" / name)
