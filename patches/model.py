"""LLaVA-1.5 for vLLM that projects and decodes only the patches a request keeps.

Letters: N images, P patches, K kept, D tower width, T text width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaForConditionalGeneration
from vllm.model_executor.models.vision import is_vit_use_data_parallel
from vllm.multimodal import MULTIMODAL_REGISTRY

from patches.config import check_checkpoint, read_config
from patches.memory import keep_buffers
from patches.processor import SieveProcessingInfo, SieveProcessor
from patches.selection import SELECTORS, PatchView, select
from patches.tower import ClsProbe, ClsTower
from patches.tower_cache import Key, TowerCache

_UNNESTED_TOWER = re.compile(
    r"^(?:model\.)?vision_tower\.(?=embeddings|pre_layrnorm|encoder|post_layernorm)"
)
_LANGUAGE_MODEL = re.compile(r"^model\.language_model\.(?!model\.)")


@MULTIMODAL_REGISTRY.register_processor(
    SieveProcessor, info=SieveProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class SieveLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA with selection between the tower and the projector.

    Raises:
        ValueError: the checkpoint is not LLaVA-1.5-like (CLIP tower, features without [CLS] from
            its last or last but one layer).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_checkpoint(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = read_config(self.config)
        with_tower_lora = bool(
            vllm_config.lora_config and vllm_config.lora_config.enable_tower_connector_lora
        )
        vision: CLIPVisionConfig = self.config.vision_config
        probe = None
        if len(self.vision_tower.vision_model.encoder.layers) < vision.num_hidden_layers:
            probe = ClsProbe(
                vision, disable_tp=is_vit_use_data_parallel(), prefix=f"{prefix}cls_probe"
            )
            self.vision_tower.cls_probe = probe
        # vLLM maps LoRA rows to adapters over the whole batch, so with adapters on the tower the
        # batch stays whole.
        batch_size = 1 << 30 if with_tower_lora else settings.tower_batch_size
        self.cls_tower = ClsTower(self.vision_tower, probe, batch_size=batch_size)
        # Features under an adapter on the tower are that adapter's.
        max_bytes = 0 if with_tower_lora else settings.tower_cache_mib << 20
        self.tower_cache = TowerCache(max_bytes)

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        """Rows for the placeholders: a `(K, T)` tensor an image, K its own.

        Args:
            **kwargs: `pixel_values` `(N, 3, H, W)`, and on the CPU, `(N,)` int64 each: `num_kept`
                (the placeholders of each image), `selector` (positions in `SELECTORS`) and `seed`
                (from the pixels); `pixels_key` `(N, 2)` int64.
        """
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return ()
        pixels = torch.cat(list(pixels)) if isinstance(pixels, list) else pixels
        assert isinstance(pixels, Tensor)
        if pixels.device.type == "cpu":
            keep_buffers()
        kept, chosen, seeds = (
            torch.as_tensor(kwargs[name]).flatten().tolist()
            for name in ("num_kept", "selector", "seed")
        )
        names = list(SELECTORS)
        selectors = [names[index] for index in chosen]
        keys = [tuple(key.flatten().tolist()) for key in kwargs["pixels_key"]]  # type: ignore[attr-defined]
        features, indices = self.select_patches(pixels, kept, selectors, seeds, keys)
        rows = [each[index] for each, index in zip(features, indices, strict=True)]
        projected = self.multi_modal_projector(torch.cat(rows))
        return torch.split(projected, kept)

    def select_patches(
        self,
        pixels: Tensor,
        kept: list[int],
        selectors: list[str],
        seeds: list[int],
        keys: list[Key] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features `(P, D)` of each image, and the `(K,)` indices it keeps; no keys, no cache."""
        needs_cls = any(
            SELECTORS[selector].needs_cls and count < self._num_patches
            for selector, count in zip(selectors, kept, strict=True)
        )
        views = self.view_patches(pixels, kept, seeds, needs_cls=needs_cls, keys=keys)
        indices = [select(name, view) for name, view in zip(selectors, views, strict=True)]
        return [view.features for view in views], indices

    def view_patches(
        self,
        pixels: Tensor,
        kept: list[int],
        seeds: list[int],
        *,
        needs_cls: bool,
        keys: list[Key] | None = None,
    ) -> list[PatchView]:
        """What selectors may look at, an image each."""
        pixels = pixels.to(self.vision_tower.dtype)
        found = self.tower_cache.through(self.cls_tower, pixels, keys, needs_cls=needs_cls)
        return [
            PatchView(
                features=seen.features,
                cls_attention=seen.attention,
                feature_layer=self.cls_tower.feature_layer,
                num_kept=count,
                seed=seed,
            )
            for seen, count, seed in zip(found, kept, seeds, strict=True)
        ]

    @property
    def _num_patches(self) -> int:
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Rows of the tower (1 + P, [CLS] included) and of the projector (K), for one image.

        vLLM also asks with its whole encoder budget and no image, to size the index buffers of a
        batch: the budget counts kept tokens, so as many images may come as it has tokens.
        """
        del modality
        num_images = 1 if mm_kwargs is not None else num_mm_embeds
        return num_images * (1 + self._num_patches), num_mm_embeds

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads published (old) and transformers >= 4.52 or 5 (new) weight names alike."""
        return super().load_weights(self._rename(weights))

    def _rename(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        last = self.config.vision_config.num_hidden_layers - 1
        probe_prefix = f"vision_tower.vision_model.encoder.layers.{last}."
        has_probe = hasattr(self.vision_tower, "cls_probe")
        for name, weight in weights:
            name = _UNNESTED_TOWER.sub("vision_tower.vision_model.", name)
            name = name.removeprefix("model.") if name.startswith("model.vision_tower") else name
            if has_probe and name.startswith(probe_prefix):
                part = name.removeprefix(probe_prefix).replace("self_attn.", "")
                if not part.startswith(("layer_norm1.", "q_proj.", "k_proj.")):
                    continue
                name = f"vision_tower.cls_probe.{part}"
            yield name, weight
