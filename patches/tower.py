"""CLIP's tower, with the [CLS] row of every layer's attention recorded beside it.

Letters: N images, P patches, S = 1 + P positions, L layers of the checkpoint's tower, H heads,
D width, C head width.

The tower keeps its fused attention. Of each layer only one row of one product is formed again,
q_cls K^T; no (1 + P) x (1 + P) matrix exists. Softmax and means over heads and layers are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader


def cls_logits(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """One layer's attention logits of [CLS], in the tower's own precision.

    The heads' queries stand in the blocks of one `(D, H)` matrix, so that a single product with
    the keys as they lie gives all heads: no head is copied out and no key is converted, which
    would cost several times the product itself.

    Args:
        query: `(N, S, D)`, only position 0 is read; D = heads of this rank times their width.
        key: `(N, S, D)`, S = 1 + P.
        num_heads: heads of this rank.

    Returns:
        `(N, S, H)`.
    """
    num_images, num_positions, width = key.shape
    q_NHC1 = query[:, 0].reshape(num_images, num_heads, -1, 1) * (width // num_heads) ** -0.5
    one_HH = torch.eye(num_heads, dtype=key.dtype, device=key.device)
    q_NDH = (q_NHC1 * one_HH[:, None, :]).view(num_images, width, num_heads)
    if key.device.type != "cpu":
        return torch.matmul(key, q_NDH)
    logits = key.new_empty(num_images, num_positions, num_heads)
    for image in range(num_images):  # the CPU's batched product would copy the keys first
        torch.mm(key[image], q_NDH[image], out=logits[image])
    return logits


def cls_attention(logits: Sequence[Tensor], total_heads: int) -> Tensor:
    """[CLS] attention of all layers, the sum over local heads divided by all heads.

    Summed over tensor-parallel ranks this is the mean over heads.

    Args:
        logits: one `(N, S, H)` a layer.
        total_heads: heads of all ranks.

    Returns:
        `(N, L, P)` float32.
    """
    logits_NLSH = torch.stack(list(logits), dim=1).float()
    return logits_NLSH.softmax(dim=2).sum(dim=3)[:, :, 1:] / total_heads


class _PlainColumnParallelLinear(ColumnParallelLinear):
    """The same layer under a type that vLLM's LoRA manager does not replace.

    An adapter on the tower would otherwise reach the probe, whose query has one row an image
    where the LoRA token mapping has 1 + P.
    """


class ClsProbe(nn.Module):
    """The [CLS] row of the layer after the feature layer, without running that layer.

    LLaVA reads features from layer L - 1, so vLLM does not build layer L; 'all layers' of the
    paper, done with Hugging Face's `output_attentions`, includes it. It needs that layer's
    LayerNorm, its K projection and one query (+0.33 % of CLIP-L/336).
    """

    def __init__(self, config: CLIPVisionConfig, *, disable_tp: bool, prefix: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj, self.k_proj = (
            _PlainColumnParallelLinear(
                width, width, prefix=f"{prefix}.{name}", disable_tp=disable_tp
            )
            for name in ("q_proj", "k_proj")
        )

    def forward(self, hidden_states: Tensor, num_heads: int) -> Tensor:
        """From `(N, 1 + P, D)` hidden states to this rank's `(N, 1 + P, H)` logits."""
        normed = self.layer_norm1(hidden_states)
        query, _ = self.q_proj(normed[:, :1])
        key, _ = self.k_proj(normed)
        return cls_logits(query, key, num_heads)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads `layer_norm1`, `q_proj` and `k_proj` of the tower's last layer."""
        return AutoWeightsLoader(self).load_weights(weights)


class ClsTower:
    """Runs a vLLM CLIP tower in bounded micro-batches and returns features and [CLS] rows.

    Not a module: it owns no weights and leaves the tower as vLLM built it, so weight loading,
    LoRA and sharding are upstream's. The rows come from a hook on the inputs of each layer's
    fused attention, which is after the (possibly LoRA-adapted) projection.

    Args:
        tower: vLLM's CLIP tower, built up to the feature layer.
        probe: the row of the layer after it, or None where the features are the last layer's.
        batch_size: most images in one call of the tower.
    """

    def __init__(self, tower: CLIPVisionModel, probe: ClsProbe | None, *, batch_size: int) -> None:
        self._tower, self._probe = tower, probe
        self.batch_size = batch_size
        self.num_images = 0
        self._logits: list[Tensor] | None = None
        layers: Any = tower.vision_model.encoder.layers
        self.feature_layer = len(layers) - 1
        attention = layers[0].self_attn
        self._num_heads = attention.num_heads_per_partition
        self._total_heads = attention.num_heads
        self._tp_size = attention.tp_size
        for layer in layers:
            layer.self_attn.attn.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if self._logits is None:
            return
        assert len(args) >= 2, "vLLM's CLIPAttention calls its attention as attn(q, k, v)"
        self._logits.append(cls_logits(args[0], args[1], self._num_heads))

    def __call__(self, pixels: Tensor, *, needs_cls: bool) -> tuple[Tensor, Tensor]:
        """From `(N, 3, H, W)` pixels to `(N, P, D)` features and `(N, L, P)` [CLS] attention.

        Without `needs_cls` the attention is zeros and costs nothing.
        """
        parts = [self._run(part, needs_cls) for part in pixels.split(self.batch_size)]
        self.num_images += len(pixels)
        features, attention = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(attention)

    def _run(self, pixels: Tensor, needs_cls: bool) -> tuple[Tensor, Tensor]:
        self._logits = [] if needs_cls else None
        try:
            hidden_states = self._tower(pixels, feature_select_strategy="full")
            features = hidden_states[:, 1:]
            if self._logits is None:
                return features, features.new_zeros(len(pixels), 1, features.shape[1])
            if self._probe is not None:
                self._logits.append(self._probe(hidden_states, self._num_heads))
            attention = cls_attention(self._logits, self._total_heads)
        finally:
            self._logits = None
        if self._tp_size > 1:
            attention = tensor_model_parallel_all_reduce(attention)
        return features, attention
