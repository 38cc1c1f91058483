"""What the tower made of the last images, for requests that keep other patches of them.

Letters: P patches, L tower layers, D tower width.

VLLM's encoder cache keeps projected rows of kept patches, so an image that comes again at another
ratio is another entry of it. A cascade asks for every unsure post twice. The tower's features are
the same at every ratio; they are kept here by the pixels that went in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

KEY_WORDS = 2
"""64-bit words of a key."""
Key = tuple[int, ...]


def pixels_key(pixels: Tensor) -> list[int]:
    """A key of one image's `(3, H, W)` pixels on the CPU: what they are, to the bit."""
    raw = pixels.contiguous().view(-1).view(torch.uint8).numpy()
    digest = blake3(raw.data).digest(length=8 * KEY_WORDS)
    return [
        int.from_bytes(digest[8 * word : 8 * (word + 1)], "little", signed=True)
        for word in range(KEY_WORDS)
    ]


@dataclass(frozen=True)
class Seen:
    """What the tower made of one image.

    Attributes:
        features: `(P, D)`.
        attention: `(L, P)` of [CLS], or zeros `(1, P)` where nobody asked for it.
        has_cls: whether it was asked for.
    """

    features: Tensor
    attention: Tensor
    has_cls: bool

    @property
    def num_bytes(self) -> int:
        """That both tensors hold."""
        return self.features.nbytes + self.attention.nbytes

    def own(self) -> Seen:
        """The same in memory of its own, apart from the batch that it came with."""
        return Seen(self.features.clone(), self.attention.clone(), self.has_cls)


class TowerCache:
    """The images that were used last, bounded by bytes.

    Args:
        max_bytes: of all tensors in it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[Key, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def through(
        self,
        tower: Callable[..., tuple[Tensor, Tensor]],
        pixels: Tensor,
        keys: Sequence[Key] | None,
        *,
        needs_cls: bool,
    ) -> list[Seen]:
        """What the tower makes of each image, or made of it before.

        Args:
            tower: from `(N, 3, H, W)` pixels to `(N, P, D)` features and `(N, L, P)` attention.
            pixels: of N images.
            keys: of each of them; without keys nothing is looked up or kept.
            needs_cls: whether the attention is asked for.
        """
        known = [self.get(key, needs_cls=needs_cls) for key in keys or ()]
        found: dict[int, Seen] = {i: seen for i, seen in enumerate(known) if seen is not None}
        missing = [image for image in range(len(pixels)) if image not in found]
        if missing:
            new = pixels if len(missing) == len(pixels) else pixels[missing]
            features, attention = tower(new, needs_cls=needs_cls)
            for row, image in enumerate(missing):
                found[image] = Seen(features[row], attention[row], needs_cls)
                if keys is not None:
                    self.put(keys[image], found[image])
        return [found[image] for image in range(len(pixels))]

    def get(self, key: Key, *, needs_cls: bool) -> Seen | None:
        """An image's entry, if it has what is needed."""
        found = self._entries.get(key)
        if found is None or (needs_cls and not found.has_cls):
            return None
        self._entries.move_to_end(key)
        return found

    def put(self, key: Key, seen: Seen) -> None:
        """Keeps an image; one that is larger than the cache is not kept."""
        if seen.num_bytes > self._max_bytes:
            return
        self._drop(key)
        self._entries[key] = seen.own()
        self.num_bytes += seen.num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        found = self._entries.pop(key, None)
        self.num_bytes -= found.num_bytes if found is not None else 0
