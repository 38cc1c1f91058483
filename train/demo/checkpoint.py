"""The demo's LLaVA: its configuration, and how it is written in the published llava-1.5 format.

transformers 5 saves `vision_tower.encoder...`, which vLLM refuses; the published checkpoints say
`vision_tower.vision_model...` and `language_model.model...`, which both read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from serving.prompts import IMAGE_TOKEN
from train.demo.tokenizer import MAX_LENGTH, save_tokenizer

IMAGE_SIZE = 112
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = GRID * GRID
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PUBLISHED_NAMES = (
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def vision_config() -> CLIPVisionConfig:
    """A CLIP tower of 4 layers; LLaVA takes the third one's output (`vision_feature_layer=-2`)."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )


def llava_config(tokenizer: LlamaTokenizer) -> LlavaConfig:
    """The whole model; the vocabulary is padded to a multiple of 64, as the published one is."""
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,  # heads of 32: the least that vLLM's CPU attention takes
        num_key_value_heads=4,
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=False,
    )


def new_model(tokenizer: LlamaTokenizer, seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    config = llava_config(tokenizer)
    config._attn_implementation = "sdpa"
    return LlavaForConditionalGeneration(config)


def save_checkpoint(
    model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer, folder: Path
) -> None:
    """Writes weights, configuration, tokenizer and processor as llava-1.5-7b-hf has them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        published_name(name): value.detach().float().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["image_token_index"] = model.config.image_token_id
    config["torch_dtype"] = "float32"
    _write_json(folder / "config.json", config)
    save_tokenizer(tokenizer, folder)
    _write_json(folder / "generation_config.json", _generation(tokenizer))
    _write_json(folder / "preprocessor_config.json", _preprocessor())
    _write_json(folder / "processor_config.json", _processor())


def published_name(name: str) -> str:
    """The name of a weight in a published llava-1.5 checkpoint."""
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _generation(tokenizer: LlamaTokenizer) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": IMAGE_SIZE},
    }


def _processor() -> dict[str, Any]:
    return {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
