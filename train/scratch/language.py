"""Trains projector and language model on what the teachers say, and on the texts themselves.

Letters: B examples, S ids, V vocabulary, P patches, D tower width, N posts.

The tower does not run: its features are given, two sights of every picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from train.demo.tower import one_cycle
from train.scratch.chats import Examiner, Example
from train.scratch.settings import LanguageRecipe

IGNORED = -100


def train_language(
    llava: Any, examiner: Examiner, sights: Sequence[Tensor], recipe: LanguageRecipe, seed: int
) -> dict[str, float]:
    """Trains everything but the tower, in place, and leaves the moving average of the weights.

    Args:
        llava: the model.
        examiner: source of examples.
        sights: patch features of all pictures, `(N, P, D)` each; one is drawn an example.
        recipe: how long, how fast, how much is dropped.
        seed: of batches and dropout.

    Returns:
        Mean losses of the last hundred steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    llava.model.vision_tower.requires_grad_(False)
    learned = nn.ModuleDict(
        {
            "projector": llava.model.multi_modal_projector,
            "language_model": llava.model.language_model,
            "head": llava.lm_head,
        }
    )
    average = AveragedModel(learned, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
    optimizer = torch.optim.AdamW(
        learned.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    batches = examiner.batches(recipe.batch_size, rng)
    losses: list[tuple[float, float]] = []
    bar = trange(recipe.num_steps, desc="language", disable=None)
    with _dropout(llava.model.language_model, recipe.dropout):
        for step in bar:
            for group in optimizer.param_groups:
                progress = step / recipe.num_steps
                group["lr"] = recipe.learning_rate * one_cycle(progress, recipe.warmup_share)
            batch = next(batches)
            on_labels, on_words = losses_of(llava, batch, _draw_sights(batch, sights, rng))
            optimizer.zero_grad()
            (on_labels + recipe.text_weight * on_words).backward()
            nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(learned)
            losses.append((float(on_labels.detach()), float(on_words.detach())))
            bar.set_postfix(
                labels=f"{losses[-1][0]:.3f}", words=f"{losses[-1][1]:.2f}", refresh=False
            )
    learned.load_state_dict(average.module.state_dict())
    on_labels_mean, on_words_mean = np.mean(losses[-100:], axis=0)
    return {
        "loss_labels": round(float(on_labels_mean), 4),
        "loss_words": round(float(on_words_mean), 4),
    }


def losses_of(llava: Any, batch: Sequence[Example], features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy on labels, and on all other words.

    Args:
        llava: the model.
        batch: examples.
        features: `(M, P, D)` of the M examples that show a picture, in their order.
    """
    num_patches = features.shape[1]
    ids, targets, soft = collate(
        batch, llava.config.image_token_id, num_patches, llava.config.pad_token_id
    )
    with torch.autocast("cpu", torch.bfloat16):
        embeds = llava.get_input_embeddings()(ids)
        images = llava.model.multi_modal_projector(features.float()).to(embeds.dtype)
        is_image = (ids == llava.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, images)
        hidden = llava.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        on_words = llava.lm_head(hidden[targets != IGNORED])
        on_labels = llava.lm_head(hidden[soft.rows, soft.places])
    words = F.cross_entropy(on_words.float(), targets[targets != IGNORED])
    return F.cross_entropy(on_labels.float(), soft.dense(on_labels.shape[1])), words


class Soft:
    """What is to be learned at the places where labels stand.

    Attributes:
        rows: of the batch, `(K,)`.
        places: whose output predicts the label, `(K,)`.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.places: list[int] = []
        self.shares: list[dict[int, float]] = []

    def dense(self, num_ids: int) -> Tensor:
        """Probabilities `(K, V)`."""
        dense = torch.zeros(len(self.shares), num_ids)
        for row, shares in enumerate(self.shares):
            dense[row, list(shares)] = torch.tensor(list(shares.values()))
        return dense


def collate(
    batch: Sequence[Example], image_token_id: int, num_patches: int, pad_token_id: int
) -> tuple[Tensor, Tensor, Soft]:
    """Ids `(B, S)`, the next id of each place `(B, S)`, and the label places.

    Padding stands on the right, where causal attention does not see it from the left.
    """
    rows = [_expand(example.ids, image_token_id, num_patches) for example in batch]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_token_id)
    soft = Soft()
    for index, (row, example) in enumerate(zip(rows, batch, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        if example.soft_at is not None:
            soft.rows.append(index)
            soft.places.append(example.soft_at + len(row) - len(example.ids) - 1)
            soft.shares.append(example.soft)
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    targets[(targets == image_token_id) | (targets == pad_token_id)] = IGNORED
    targets[soft.rows, soft.places] = IGNORED
    return ids, targets, soft


def _expand(ids: list[int], image_token_id: int, num_patches: int) -> list[int]:
    return [copy for one in ids for copy in [one] * (num_patches if one == image_token_id else 1)]


def _draw_sights(
    batch: Sequence[Example], sights: Sequence[Tensor], rng: np.random.Generator
) -> Tensor:
    shown = [example.picture for example in batch if example.picture is not None]
    drawn = [sights[int(rng.integers(len(sights)))][picture] for picture in shown]
    return torch.stack(drawn) if drawn else sights[0][:0]


@contextmanager
def _dropout(language_model: Any, share: float) -> Iterator[None]:
    """Zeroes a share of the word rows' and of each layer's two outputs; Llama has no dropout."""

    def drop(module: nn.Module, inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share), *output[1:])
        return F.dropout(output, share)

    hooks = [
        part.register_forward_hook(drop)
        for layer in language_model.layers
        for part in (layer.self_attn, layer.mlp)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
