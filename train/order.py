"""The order in which examples are seen: drawn from seed and epoch alone, so that it resumes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

GROUP = 32  # batches that are sorted by length together: little padding, much shuffling


class Order(Sampler[int]):
    """Indices of one epoch.

    Args:
        lengths: of the examples, `(N,)`.
        batch_size: examples a batch.
        seed: with the epoch's number, decides everything.
        group_by_length: batches of like lengths, in random order.
        weights: `(N,)` to draw with replacement by, instead of each once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        group_by_length: bool,
        weights: np.ndarray | None = None,
    ) -> None:
        self.epoch = 0
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._group_by_length, self._weights = group_by_length, weights

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        count = len(self._lengths)
        if self._weights is None:
            order = rng.permutation(count)
        else:
            order = rng.choice(count, size=count, p=self._weights / self._weights.sum())
        if self._group_by_length:
            order = self._grouped(order, rng)
        return iter(order.tolist())

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sorted within stretches of the order, then the batches shuffled; the short one last."""
        stretch = self._batch_size * GROUP
        parts = [order[i : i + stretch] for i in range(0, len(order), stretch)]
        ranked = np.concatenate([part[np.argsort(-self._lengths[part])] for part in parts])
        whole = len(ranked) // self._batch_size
        batches = ranked[: whole * self._batch_size].reshape(whole, -1)
        return np.concatenate([batches[rng.permutation(whole)].ravel(), ranked[batches.size :]])
