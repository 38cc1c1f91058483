"""Facts of a checkpoint, read from its configuration: an HTTP side on Ray has no engine to ask."""

from __future__ import annotations

from transformers import AutoConfig

from serving.protocol import EngineInfo
from serving.settings import Settings


def engine_info(settings: Settings) -> EngineInfo:
    """What an engine with these settings would say of itself."""
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    vision, text = config.vision_config, config.text_config
    return EngineInfo(
        model=settings.served_name,
        num_patches=(vision.image_size // vision.patch_size) ** 2,
        max_model_len=settings.max_model_len or text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )
