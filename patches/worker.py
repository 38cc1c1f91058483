"""What a worker can be asked beside running the model (vLLM's `worker_extension_cls`)."""

from __future__ import annotations

from typing import Any


class SieveWorker:
    """Methods mixed into vLLM's worker; call them with `collective_rpc`."""

    model_runner: Any

    def sieve_tower_images(self) -> int:
        """Images that went through this worker's tower: a cached image does not count."""
        return int(self.model_runner.get_model().cls_tower.num_images)
