"""What a model answers to posts, in Hugging Face.

Letters: S prompt length, E language model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from serving.posts import ImageSource, Post
from serving.prompts import encode, render_prompt
from serving.structures import LabelStructure
from train.decode import decode, pad_left
from train.model import Llava
from train.sight import Sight

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A post's labels by a model.

    Attributes:
        id: the post's.
        labels: predicted label by field.
        probabilities: by field, summing to 1, a field's conditional on the labels before it.
        kept: visual tokens kept, all images together.
        patches: visual tokens before selection.
    """

    id: str
    labels: Mapping[str, str]
    probabilities: Mapping[str, Mapping[str, float]]
    kept: int
    patches: int


def predict(
    model: Llava,
    structure: LabelStructure,
    posts: Sequence[Post],
    sight: Sight,
    *,
    ratio: float = 1.0,
    selector: str = "cls",
    batch_size: int = BATCH_SIZE,
    images: Literal["own", "none", "shuffled"] = "own",
    texts: Literal["own", "none"] = "own",
    seed: int = 0,
    title: str | None = None,
) -> list[Prediction]:
    """Labels of posts under the structure's constraint, in the posts' order.

    Args:
        model: checkpoint and adapter.
        structure: what is asked.
        posts: whom it is asked about.
        sight: their images.
        ratio: retention ratio.
        selector: a name in `patches.selection.SELECTORS`.
        batch_size: posts at once.
        images: the posts' own, none, or those of other posts.
        texts: the posts' own, or none.
        seed: of the shuffle.
        title: of the progress bar; None shows none.
    """
    asked = list(posts) if images == "own" else with_other_images(posts, images, seed)
    if texts == "none":
        asked = [replace(post, text="") for post in asked]
    sight.see(asked)
    constraint = model.constraint(structure)
    found: dict[int, Prediction] = {}
    bar = tqdm(total=len(posts), desc=title, disable=None if title else True, unit="post")
    for batch in _batches(asked, batch_size):
        prompts, counts = [], []
        for index in batch:
            prompt, kept, patches = embed_post(
                model, structure, asked[index], sight, ratio=ratio, selector=selector
            )
            prompts.append(prompt)
            counts.append((kept, patches))
        scores = decode(model, prompts, constraint)
        for index, scored, (kept, patches) in zip(batch, scores, counts, strict=True):
            found[index] = Prediction(
                id=asked[index].id,
                labels=scored.labels,
                probabilities=scored.probabilities,
                kept=kept,
                patches=patches,
            )
        bar.update(len(batch))
    bar.close()
    return [found[index] for index in range(len(posts))]


@torch.inference_mode()
def write_freely(
    model: Llava,
    structure: LabelStructure,
    posts: Sequence[Post],
    sight: Sight,
    *,
    ratio: float = 1.0,
    selector: str = "cls",
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """What the model writes without the constraint, greedily; at most a long answer's tokens."""
    sight.see(posts)
    constraint = model.constraint(structure)
    longest = sum(max(map(len, field.segments.values())) for field in constraint.fields)
    written: dict[int, str] = {}
    for batch in _batches(posts, batch_size):
        prompts = [
            embed_post(model, structure, posts[index], sight, ratio=ratio, selector=selector)[0]
            for index in batch
        ]
        embeds, mask = pad_left(prompts)
        ids = model.llava.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=longest + len(constraint.tail) + 2,
            do_sample=False,
        )
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        written |= dict(zip(batch, texts, strict=True))
    return [written[index].strip() for index in range(len(posts))]


@torch.inference_mode()
def embed_post(
    model: Llava,
    structure: LabelStructure,
    post: Post,
    sight: Sight,
    *,
    ratio: float = 1.0,
    selector: str = "cls",
) -> tuple[Tensor, int, int]:
    """A post's prompt as the language model reads it `(S, E)`, kept and all visual tokens."""
    prompt = render_prompt(model.tokenizer, structure, post.text, len(post.images))
    ids = torch.tensor(encode(model.tokenizer, prompt), device=model.device)
    rows = list(model.embed_ids(ids)[:, None])
    seen = sight.of(post)
    positions = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    kept = 0
    for position, one in zip(positions, seen, strict=True):
        features = one.keep(ratio, selector).to(model.device, model.dtype)
        rows[position] = model.project(features)
        kept += len(features)
    return torch.cat(rows), kept, len(seen) * model.num_patches


def with_other_images(
    posts: Sequence[Post], images: Literal["own", "none", "shuffled"], seed: int
) -> list[Post]:
    """Posts without images, or each with those of another post that has as many."""
    if images == "none":
        return [replace(post, images=()) for post in posts]
    others: dict[int, tuple[ImageSource | bytes, ...]] = {}
    by_count: dict[int, list[int]] = {}
    for index, post in enumerate(posts):
        by_count.setdefault(len(post.images), []).append(index)
    generator = torch.Generator().manual_seed(seed)
    for indices in by_count.values():
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator)]
        # A cycle through a random order: nobody keeps his own.
        for one, other in zip(order, [*order[1:], order[0]], strict=True):
            others[one] = posts[other].images
    return [replace(post, images=others[index]) for index, post in enumerate(posts)]


def _batches(posts: Sequence[Post], size: int) -> Iterator[list[int]]:
    """Indices of posts, those of like length together, so that little is padding."""
    order = sorted(range(len(posts)), key=lambda i: (len(posts[i].images), len(posts[i].text)))
    for start in range(0, len(order), size):
        yield order[start : start + size]
