"""Pixels of pictures that have the model's size already, without Hugging Face's way there.

Letters: N images, S their side.

The server's image workers bring a picture to the checkpoint's square (`serving.fitting`), so all
that is left is to scale it to floats. Hugging Face's processor does that as well, among a
millisecond of checking arguments. What is computed here is its fused `(x - 255 mean) / (255 std)`,
in float32; at start it is compared with the processor, to the bit, and where they differ it is not
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class PixelScale:
    """Scales pictures of one size as a checkpoint's image processor does.

    Args:
        side: S of the pictures.
        mean: of each channel, of values from 0 to 1.
        std: likewise.
    """

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._size = (side, side)
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (mean, std))

    @classmethod
    def of(cls, image_processor: Any) -> PixelScale | None:
        """Of a Hugging Face image processor; None where it does anything else to such pictures."""
        side = (image_processor.crop_size or image_processor.size or {}).get("height")
        mean, std = image_processor.image_mean, image_processor.image_std
        if side is None or not (mean and std and len(mean) == len(std) == 3):
            return None
        scale = cls(side, mean, std)
        if side * side < 256:
            return None
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        noise.reshape(-1, 3)[:256] = np.arange(256, dtype=np.uint8)[:, None]  # every value there is
        picture = Image.fromarray(noise)
        theirs = image_processor(picture, return_tensors="pt")["pixel_values"]
        ours = scale([picture])
        return scale if ours is not None and torch.equal(ours, theirs) else None

    def __call__(self, images: Sequence[Any]) -> Tensor | None:
        """`(N, 3, S, S)` float32 of RGB pictures; None where one is of another kind or size."""
        if not all(self._fits(image) for image in images):
            return None
        pixels = torch.empty(len(images), 3, *self._size)
        for row, image in zip(pixels, images, strict=True):
            row.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return pixels.sub_(self._mean).div_(self._std)

    def _fits(self, image: Any) -> bool:
        return isinstance(image, Image.Image) and image.mode == "RGB" and image.size == self._size
