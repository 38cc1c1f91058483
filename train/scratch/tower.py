"""The vision tower, trained to tell from a picture what descriptors, texts and teachers say of it.

Letters: N images, P patches, D tower width, T targets, S side of the square image.

A few thousand pairs are too few for CLIP's contrast of images and texts. All targets are numbers
of one vector, learned by one loss, once from [CLS] and once from the mean of the patches that
LLaVA reads: so the patches carry what the language model needs, and [CLS] must look for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPVisionModel

from train.demo.checkpoint import CLIP_MEAN, CLIP_STD, Shape, vision_config
from train.demo.tower import load_state, one_cycle, save_state
from train.scratch.settings import TowerRecipe

SAVE_EVERY = 100


class Looker(nn.Module):
    """A tower with what it needs in training only: a head on [CLS] and one on the patches."""

    def __init__(self, shape: Shape, num_targets: int) -> None:
        super().__init__()
        config = vision_config(shape)
        config._attn_implementation = "eager"  # twice as fast as sdpa to train on a CPU
        self.tower = CLIPVisionModel(config)
        self.from_cls = nn.Linear(shape.tower_width, num_targets)
        self.from_patches = nn.Linear(shape.tower_width, num_targets)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What [CLS] and what the patches say, `(N, T)` each."""
        output = self.tower(pixels, output_hidden_states=True)
        patches = output.hidden_states[-2][:, 1:].mean(dim=1)
        return self.from_cls(output.pooler_output), self.from_patches(patches)


def train_tower(
    pixels: Tensor, targets: Tensor, shape: Shape, recipe: TowerRecipe, seed: int, state: Path
) -> tuple[CLIPVisionModel, float]:
    """A trained tower and its last loss; continues from `state` where that file exists.

    Args:
        pixels: `(N, 3, S, S)` uint8.
        targets: `(N, T)`.
        shape: of the tower.
        recipe: how long and how fast.
        seed: of weights and batches.
        state: where unfinished work is kept.
    """
    torch.manual_seed(seed)
    model = Looker(shape, targets.shape[1])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    first, last = load_state(state, model, optimizer), float("nan")
    bar = trange(
        first, recipe.num_steps, initial=first, total=recipe.num_steps, desc="tower", disable=None
    )
    for step in bar:
        for group in optimizer.param_groups:
            progress = step / recipe.num_steps
            group["lr"] = recipe.learning_rate * one_cycle(progress, recipe.warmup_share)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        seen = normalize(augment(pixels[chosen], generator))
        with torch.autocast("cpu", torch.bfloat16):
            from_cls, from_patches = model(seen)
        wrong = F.mse_loss(from_cls.float(), targets[chosen], reduction="sum")
        wrong = wrong + F.mse_loss(from_patches.float(), targets[chosen], reduction="sum")
        loss = wrong / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = round(float(loss.detach()), 4)
        bar.set_postfix(loss=last, refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save_state(state, model, optimizer, step + 1)
    return model.tower.eval(), last


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, cut and relit images, `(N, 3, S, S)` float in [0, 255].

    A cut keeps at least three quarters of each side; colours keep their hue, which the targets
    speak of.
    """
    count = len(pixels)
    flipped = torch.rand(count, generator=generator) < 0.5
    share = 1 - 0.25 * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - share)[:, None]
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = torch.where(flipped, -share, share)
    place[:, 1, 1] = share
    place[:, :, 2] = shift
    grid = F.affine_grid(place, list(pixels.shape), align_corners=False)
    cut = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    contrast = 0.85 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    light = 30 * torch.rand(count, 1, 1, 1, generator=generator) - 15
    return ((cut - 128) * contrast + 128 + light).clamp(0, 255)


def normalize(pixels: Tensor) -> Tensor:
    """`(N, 3, S, S)` in [0, 255] as the checkpoint's processor gives it."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def look(tower: CLIPVisionModel, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Patch features of images for LLaVA, `(N, P, D)` bfloat16; augmented with a generator."""
    parts = []
    for start in trange(0, len(pixels), 128, desc="features", leave=False, disable=None):
        batch = pixels[start : start + 128]
        seen = batch if generator is None else augment(batch, generator)
        output = tower(normalize(seen), output_hidden_states=True)
        parts.append(output.hidden_states[-2][:, 1:].bfloat16())
    return torch.cat(parts)
