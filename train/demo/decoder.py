"""Trains the language side on answers only: first the base model, later the adapters.

Letters as in `examples.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import LlavaForConditionalGeneration

from train.demo.examples import IGNORED, Album, ExampleSource, collate
from train.demo.tower import one_cycle


@dataclass(frozen=True, kw_only=True)
class AnswerRecipe:
    """How a language model learns answers."""

    num_steps: int
    learning_rate: float
    batch_size: int = 48
    weight_decay: float = 0.01
    warmup_share: float = 0.1


BASE_RECIPE = AnswerRecipe(num_steps=500, learning_rate=3e-3)


def train_answers(
    llava: LlavaForConditionalGeneration,
    album: Album,
    source: ExampleSource,
    recipe: AnswerRecipe,
    *,
    seed: int,
    name: str,
) -> None:
    """Trains the parameters that ask for gradients, in place, on the loss of answer ids.

    The tower does not run: `album` holds its features. No patch is left out, as in the paper.
    """
    parameters = [p for p in llava.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng(seed)
    steps = trange(recipe.num_steps, desc=name)
    for step in steps:
        for group in optimizer.param_groups:
            progress = step / recipe.num_steps
            group["lr"] = recipe.learning_rate * one_cycle(progress, recipe.warmup_share)
        examples = [source(rng) for _ in range(recipe.batch_size)]
        batch = collate(examples, llava.config.image_token_id, llava.config.pad_token_id)
        loss = answer_loss(llava, album, *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps.set_postfix(loss=f"{float(loss):.3f}", refresh=False)


def answer_loss(
    llava: LlavaForConditionalGeneration,
    album: Album,
    ids: Tensor,
    targets: Tensor,
    pictures: Tensor,
) -> Tensor:
    """Mean cross-entropy of the answers' ids.

    Padding stands on the right, where causal attention does not see it from the left.
    """
    with torch.autocast("cpu", torch.bfloat16):
        embeds = llava.get_input_embeddings()(ids)
        features = album.features[pictures].float()
        images = llava.model.multi_modal_projector(features).to(embeds.dtype)
        is_image = (ids == llava.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, images)
        hidden = llava.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        logits = llava.lm_head(hidden[targets != IGNORED])
    return F.cross_entropy(logits.float(), targets[targets != IGNORED])


def freeze_tower(llava: LlavaForConditionalGeneration) -> None:
    """Keeps the tower as it is while the projector and the language model learn."""
    llava.model.vision_tower.requires_grad_(False)
