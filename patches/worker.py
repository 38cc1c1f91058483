"""What a worker can be asked beside running the model (vLLM's `worker_extension_cls`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patches.selection import SELECTORS, score_cls, select


class SieveWorker:
    """Methods mixed into vLLM's worker; call them with `collective_rpc`."""

    model_runner: Any

    def sieve_tower_images(self) -> int:
        """Images that went through this worker's tower: a cached image does not count."""
        return int(self.model_runner.get_model().cls_tower.num_images)

    def sieve_select(
        self,
        pixels: bytes,
        shape: list[int],
        kept: list[int],
        selectors: list[str],
        seeds: list[int],
    ) -> list[list[int]]:
        """Indices each image would keep, from `(N, 3, H, W)` float32 pixels as raw bytes."""
        model = self.model_runner.get_model()
        with torch.inference_mode():
            tensor = self._read_pixels(pixels, shape)
            _, indices = model.select_patches(tensor, kept, selectors, seeds)
        return [index.tolist() for index in indices]

    def sieve_explain(
        self,
        pixels: bytes,
        shape: list[int],
        kept: list[int],
        selectors: list[str],
        seeds: list[int],
    ) -> list[dict[str, list[Any]]]:
        """Which patches each image keeps and why: one pass of the tower, no cache.

        Returns:
            An image each: `kept` indices; `scores` of its selector and `cls_attention` (mean over
            heads and all layers), one number a patch.
        """
        model = self.model_runner.get_model()
        with torch.inference_mode():
            tensor = self._read_pixels(pixels, shape)
            views = model.view_patches(tensor, kept, seeds, needs_cls=True)
            return [
                {
                    "kept": select(name, view).tolist(),
                    "scores": SELECTORS[name].score(view).tolist(),
                    "cls_attention": score_cls(view).tolist(),
                }
                for name, view in zip(selectors, views, strict=True)
            ]

    def _read_pixels(self, pixels: bytes, shape: list[int]) -> Tensor:
        array = np.frombuffer(pixels, dtype=np.float32).reshape(shape)
        return torch.from_numpy(array.copy()).to(self.model_runner.device)
