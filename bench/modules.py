"""One CLIP tower in this process, as vLLM builds it in a worker, in its stock and our form.

Letters: N images, S positions (1 + P), D width.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from bench.flops import Shape
from patches.tower import ClsProbe, ClsTower, cls_attention, cls_logits


class Towers:
    """The variants of `bench tower` on one set of weights.

    Args:
        tower: vLLM's CLIP tower, ready to run.
        probe: the row of the layer that is not built.
        shape: sizes of both.
        num_images: N of one call.
    """

    def __init__(
        self, tower: Any, probe: ClsProbe, shape: Shape, num_images: int, dtype: torch.dtype
    ) -> None:
        self._shape, self._num_images, self._dtype = shape, num_images, dtype
        self._device = next(tower.parameters()).device
        # The same parameters under modules of its own: our hooks stay on one of the two.
        self._stock = copy.deepcopy(tower, {id(p): p for p in tower.parameters()})
        self._ours = ClsTower(tower, probe, batch_size=max(8, num_images))
        self._probe = probe
        self._recorded, self._hidden = self._record()

    def fresh_pixels(self, seed: int) -> Tensor:
        """`(N, 3, H, W)` of noise."""
        generator = torch.Generator().manual_seed(seed)
        size = self._shape.image_size
        pixels = torch.randn(self._num_images, 3, size, size, generator=generator)
        return pixels.to(self._device, self._dtype)

    def calls(self) -> dict[str, Callable[[Tensor], object]]:
        """What is timed, by variant; each takes pixels."""
        return {
            "stock": lambda pixels: self._stock(pixels, feature_select_strategy="default"),
            "served": lambda pixels: self._ours(pixels, needs_cls=False),
            "scored": lambda pixels: self._ours(pixels, needs_cls=True),
            "scoring": lambda pixels: self._score(),
        }

    def _record(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Query and key of each layer, and the last hidden states `(N, S, D)`."""
        recorded: list[tuple[Tensor, Tensor]] = []
        handles = [
            layer.self_attn.attn.register_forward_pre_hook(
                lambda module, args: recorded.append((args[0], args[1]))
            )
            for layer in self._stock.vision_model.encoder.layers
        ]
        hidden = self._stock(self.fresh_pixels(0), feature_select_strategy="full")
        for handle in handles:
            handle.remove()
        return recorded, hidden

    def _score(self) -> Tensor:
        heads = self._shape.tower_heads
        logits = [cls_logits(query, key, heads) for query, key in self._recorded]
        logits.append(self._probe(self._hidden, heads))
        return cls_attention(logits, heads)


@contextmanager
def build_tower(shape: Shape, dtype_name: str, num_images: int) -> Iterator[Towers]:
    """Random weights in vLLM's modules, with the kernels a worker would choose."""
    _bind_threads()
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models.clip import CLIPVisionModel

    dtype, device = getattr(torch, dtype_name), _device()
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_mlp,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    previous = torch.get_default_dtype()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device))):
        _start_single_process(device)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                tower = CLIPVisionModel(
                    vision,
                    num_hidden_layers_override=shape.tower_layers - 1,
                    require_post_norm=False,
                    prefix="vision_tower",
                )
                probe = ClsProbe(vision, disable_tp=False, prefix="cls_probe")
            for module in (tower, probe):
                _fill(module)
                _choose_kernels(module)
            yield Towers(tower, probe, shape, num_images, dtype)
        finally:
            torch.set_default_dtype(previous)
            cleanup_dist_env_and_memory()


def _device() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _bind_threads() -> None:
    """All cores, as `python -m serving` gives them to its worker."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def _start_single_process(device: str) -> None:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.utils.network_utils import get_open_port

    backend = "gloo" if device == "cpu" else "nccl"
    address = f"tcp://127.0.0.1:{get_open_port()}"
    init_distributed_environment(1, 0, address, 0, backend)
    initialize_model_parallel(1, 1)


def _fill(module: nn.Module) -> None:
    """Seeded weights of a trained tower's size."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name or "layrnorm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.copy_(torch.randn(parameter.shape) * 0.02)


def _choose_kernels(module: nn.Module) -> None:
    """What vLLM's loader does after loading: packs weights for the platform's kernels."""
    for layer in module.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)
