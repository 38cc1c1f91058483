"""Placeholders and cache keys of a request, in the API process.

Letters: N images, P patches, K kept.

The number of placeholder tokens written here must equal the number of rows that `patches.model`
makes in the worker. Both are `num_kept` of the same ratio: it is computed here, once an image, and
travels to the worker as the tensor `num_kept`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from patches.config import RATIO_KEY, SELECTOR_KEY, Retention, read_config, resolve_retention
from patches.pixels import PixelScale
from patches.selection import SELECTORS, image_seed
from patches.tower_cache import KEY_WORDS, pixels_key

_OURS = (RATIO_KEY, SELECTOR_KEY)
_HASH_VERSION = 1


class SieveProcessingInfo(LlavaProcessingInfo):
    """LLaVA's processing facts, plus the engine's default retention."""

    @functools.cached_property
    def default_retention(self) -> Retention:
        """What a request gets that does not ask."""
        return read_config(self.get_hf_config()).retention

    @functools.cached_property
    def has_tower_cache(self) -> bool:
        """Whether workers know images by their pixels."""
        return read_config(self.get_hf_config()).tower_cache_mib > 0

    @functools.cached_property
    def num_patches(self) -> int:
        """P of one image."""
        return self.get_max_image_tokens()


class SieveProcessor(LlavaMultiModalProcessor):
    """LLaVA's processor with K placeholders an image instead of P."""

    info: SieveProcessingInfo

    def _retention(self, kwargs: Mapping[str, object]) -> Retention:
        return resolve_retention(kwargs, self.info.default_retention)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Memory is profiled at ratio 1.0 whatever the default: any request may ask for it."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        full = Retention(ratio=1.0, selector=self.info.default_retention.selector)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs=full.processor_kwargs())

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        """Cache keys by what is computed, not by how it was asked for.

        The engine's default, an explicit ratio equal to it and one that rounds to the same K
        share their entries; other counts, selectors, selector versions or image processing do
        not, also in a cache that outlives this server.
        """
        retention = self._retention(inputs.hf_processor_mm_kwargs)
        kept = retention.num_kept(self.info.num_patches)
        # At ratio 1.0 every selector keeps everything.
        selector = retention.selector if kept < self.info.num_patches else "all"
        version = SELECTORS[selector].version if selector in SELECTORS else 0
        identity = f"{_HASH_VERSION}/{kept}/{selector}/{version}/{self._image_processing}"
        kwargs = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if k not in _OURS}
        return super()._get_mm_hashes(
            dataclasses.replace(inputs, hf_processor_mm_kwargs={**kwargs, "sieve": identity})
        )

    @functools.cached_property
    def _image_processing(self) -> str:
        """The checkpoint's image processing (crop or pad, size, mean), as a short hash."""
        settings = self.info.get_hf_processor().image_processor.to_json_string()
        return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()

    def look_at(self, images: Sequence[Image.Image], retention: Retention) -> BatchFeature:
        """What a request with these images sends to the worker, past every cache.

        Returns:
            `pixel_values` `(N, 3, H, W)` in the model's dtype; `num_kept`, `selector` (a position
            in `SELECTORS`) and `seed`, `(N,)` each; `pixels_key` `(N, 2)`.
        """
        items = self.info.parse_mm_data({"image": list(images)})
        return self._apply_hf_processor_main(items, retention.processor_kwargs())

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        theirs = {name: value for name, value in hf_kwargs.items() if name not in _OURS}
        images = hf_data.get("images")
        if self._pixel_scale and isinstance(images, list) and len(hf_data) == 1 and not theirs:
            pixels = self._pixel_scale(images)
            if pixels is not None:
                dtype = self.info.ctx.model_config.dtype
                return BatchFeature({"pixel_values": pixels.to(dtype)})
        return super()._call_hf_processor(hf_data, theirs)

    @functools.cached_property
    def _pixel_scale(self) -> PixelScale | None:
        return PixelScale.of(self.info.get_hf_processor().image_processor)

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        pixels = processed_data.get("pixel_values")
        if pixels is None:
            return processed_data
        retention = self._retention(hf_processor_mm_kwargs)
        num_images = len(pixels)
        needs_seed = retention.selector == "random"
        seeds = [image_seed(torch.as_tensor(image)) if needs_seed else 0 for image in pixels]
        kept = retention.num_kept(self.info.num_patches)
        processed_data["num_kept"] = torch.full((num_images,), kept)
        index = list(SELECTORS).index(retention.selector)
        processed_data["selector"] = torch.full((num_images,), index)
        processed_data["seed"] = torch.tensor(seeds, dtype=torch.int64)
        keys = [self._key(torch.as_tensor(image)) for image in pixels]
        processed_data["pixels_key"] = torch.tensor(keys, dtype=torch.int64)
        return processed_data

    def _key(self, pixels: torch.Tensor) -> list[int]:
        """For the worker's tower cache, where it has one."""
        return pixels_key(pixels) if self.info.has_tower_cache else [0] * KEY_WORDS

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_cpu = {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True)
            for name in ("num_kept", "selector", "seed", "pixels_key")
        }
        return {"pixel_values": MultiModalFieldConfig.batched("image"), **on_cpu}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        if "image" in mm_items and isinstance(mm_items["image"], ImageEmbeddingItems):
            raise ValueError("images as precomputed embeddings are not accepted; send the image")
        token_id = self.info.get_hf_config().image_token_index
        kept = self._retention(hf_processor_mm_kwargs).num_kept(self.info.num_patches)
        return [
            PromptReplacement(modality="image", target=[token_id], replacement=[token_id] * kept)
        ]
