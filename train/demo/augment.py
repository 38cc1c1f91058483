"""Random changes of training images that leave the label alone.

Letters: N images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.demo.checkpoint import GRID


def augment(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored, recoloured and faintly overlaid images.

    Args:
        pixels: `(N, 3, H, W)` uint8.
        masks: `(N, 64)` bool signal patches.
        generator: source of all randomness.

    Returns:
        `(N, 3, H, W)` float in [0, 255], and the masks that belong to it.
    """
    pixels, masks = _mirror(pixels.float(), masks, generator)
    return _recolor(_overlay(pixels, generator), generator), masks


def _mirror(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    flipped = torch.rand(len(pixels), generator=generator) < 0.5
    mirrored = masks.view(-1, GRID, GRID).flip(-1).flatten(1)
    return (
        torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels),
        torch.where(flipped[:, None], mirrored, masks),
    )


def _overlay(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blends in a little of another image, so that backgrounds never repeat."""
    share = 0.2 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    others = pixels[torch.randperm(len(pixels), generator=generator)]
    return pixels.lerp(others.flip(-2), share)


def _recolor(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mixes the channels by a random matrix, then changes contrast and brightness."""
    count = len(pixels)
    mixing = torch.eye(3)[torch.randperm(3, generator=generator)]
    mixing = mixing + 0.25 * torch.randn(count, 3, 3, generator=generator)
    mixing = mixing / mixing.sum(dim=-1, keepdim=True).clamp(min=0.5)
    mixed = torch.bmm(mixing, pixels.flatten(2)).view_as(pixels)
    contrast = 0.7 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    shift = 40 * torch.rand(count, 1, 1, 1, generator=generator) - 20
    return ((mixed - 128) * contrast + 128 + shift).clamp(0, 255)
