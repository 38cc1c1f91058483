"""Images brought to the model's size before they cross to another process.

What crosses is the square that the checkpoint's own image processor would make of the picture,
before it is scaled to floats. Doing that twice changes nothing (`Fitting.of` makes sure), so the
engine sees the very pixels that it would make of the file, and a photo of 12 megapixels crosses as
100 kB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

HEAVY = ("torch", "torchvision", "transformers.models.auto.image_processing_auto")
"""Imported once, by the process that workers are forked from: else seconds for each of them."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How images are brought to the model's size before they cross to the engine's process.

    Attributes:
        model: the checkpoint whose image processor does it; None leaves images as they are.
    """

    model: str | None

    @classmethod
    def of(cls, model: str) -> Fitting:
        """Fits where processing a fitted image gives the same pixels, to the bit."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        noise = np.random.default_rng(0)
        for size in ((331, 470), (77, 60)):
            image = Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
            fitted = Image.fromarray(fit(processor, image))
            if not np.array_equal(_pixels(processor, image), _pixels(processor, fitted)):
                return cls(model=None)
        return cls(model=model)

    def load(self) -> Any:
        """The checkpoint's image processor, on one thread; None where images stay as they are."""
        if self.model is None:
            return None
        import torch
        from transformers import AutoImageProcessor

        torch.set_num_threads(1)
        return AutoImageProcessor.from_pretrained(self.model, trust_remote_code=False)


def _pixels(processor: Any, image: Image.Image) -> np.ndarray:
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def fit(processor: Any, image: Image.Image) -> np.ndarray:
    """The image as `(height, width, 3)` uint8; as it is where there is no processor."""
    if processor is None:
        return np.asarray(image)
    square = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)
    return np.ascontiguousarray(square["pixel_values"][0].transpose(1, 2, 0), dtype=np.uint8)
