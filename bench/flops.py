"""Multiply-adds of one request, counted from the architecture (2 FLOP each).

Matrix products and attention only: norms, activations and embedding look-ups are well below 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from patches.selection import num_kept

RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
PAPER_SPEEDUPS = {0.8: 1.15, 0.6: 1.40, 0.4: 1.75, 0.2: 2.33, 0.05: 3.16}
"""'Towards Robust Multimodal Sentiment Detection with LLaVA', Table 4."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA-1.5's sizes; the defaults are LLaVA-1.5-7B with CLIP-L/336.

    Attributes:
        tower_layers: layers of the checkpoint's tower; features come from the last but one.
    """

    image_size: int = 336
    patch_size: int = 14
    tower_layers: int = 24
    tower_width: int = 1024
    tower_mlp: int = 4096
    tower_heads: int = 16
    layers: int = 32
    width: int = 4096
    mlp: int = 11008
    heads: int = 32
    vocab_size: int = 32064

    @property
    def num_patches(self) -> int:
        """P, visual tokens of an image at ratio 1.0."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_parameters(self) -> int:
        """Weights of a checkpoint; norms and biases are well below 1 %."""
        tower, text = self.tower_width, self.width
        tower_layer = 4 * tower * tower + 2 * tower * self.tower_mlp
        embedding = (3 * self.patch_size**2 + self.num_patches + 1) * tower
        projector = tower * text + text * text
        text_layer = 4 * text * text + 3 * text * self.mlp
        language = self.layers * text_layer + 2 * self.vocab_size * text
        return embedding + self.tower_layers * tower_layer + projector + language

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.layers * self.width

    def tower_flops(self) -> float:
        """One image through the patch embedding and the layers that are run (all but one)."""
        positions, width = self.num_patches + 1, self.tower_width
        embedding = 2 * self.num_patches * 3 * self.patch_size**2 * width
        products = 2 * positions * (4 * width * width + 2 * width * self.tower_mlp)
        attention = 4 * positions * positions * width
        return embedding + (self.tower_layers - 1) * (products + attention)

    def projector_flops(self, kept: int) -> float:
        """The two-layer projector on K patches."""
        return 2 * kept * (self.tower_width * self.width + self.width * self.width)

    def _layers_flops(self, tokens: int) -> float:
        products = 4 * self.width * self.width + 3 * self.width * self.mlp
        return 2 * tokens * self.layers * products

    def prefill_flops(self, tokens: int) -> float:
        """The prompt through the language model; logits of its last position only."""
        attention = self.layers * 4 * self.width * tokens * (tokens + 1) / 2
        return self._layers_flops(tokens) + attention + 2 * self.width * self.vocab_size

    def decode_flops(self, prompt: int, tokens: int) -> float:
        """Tokens after the first, which the prefill gives."""
        lengths = sum(prompt + step for step in range(1, tokens))
        attention = self.layers * 4 * self.width * lengths
        head = 2 * self.width * self.vocab_size
        return self._layers_flops(tokens - 1) + attention + (tokens - 1) * head

    def request_flops(self, ratio: float, *, text_tokens: int, output_tokens: int) -> float:
        """Everything one image-and-text request costs at a retention ratio."""
        kept = num_kept(self.num_patches, ratio)
        prompt = kept + text_tokens
        return (
            self.tower_flops()
            + self.projector_flops(kept)
            + self.prefill_flops(prompt)
            + self.decode_flops(prompt, output_tokens)
        )

    def speedup(self, ratio: float, *, text_tokens: int, output_tokens: int) -> float:
        """How many times fewer FLOP than at ratio 1.0."""
        sizes = {"text_tokens": text_tokens, "output_tokens": output_tokens}
        return self.request_flops(1.0, **sizes) / self.request_flops(ratio, **sizes)

    def prefill_speedup(self, ratio: float, *, text_tokens: int) -> float:
        """The same for the language model's prefill alone."""
        full = self.prefill_flops(self.num_patches + text_tokens)
        return full / self.prefill_flops(num_kept(self.num_patches, ratio) + text_tokens)


SHAPES = {
    "llava-1.5-7b": Shape(),
    "llava-1.5-13b": Shape(layers=40, width=5120, mlp=13824, heads=40),
    "clip-l": Shape(layers=2, width=512, mlp=1376, heads=8),
}
"""What `bench shape` can take: the published two, and CLIP-L/336's tower on a small decoder."""
