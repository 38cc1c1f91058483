"""What a worker can be asked beside running the model (vLLM's `worker_extension_cls`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


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
        array = np.frombuffer(pixels, dtype=np.float32).reshape(shape)
        with torch.inference_mode():
            tensor = torch.from_numpy(array.copy()).to(self.model_runner.device)
            _, indices = model.select_patches(tensor, kept, selectors, seeds)
        return [index.tolist() for index in indices]
