"""A small LLaVA: its configuration, and how it is written in the published llava-1.5 format.

transformers 5 saves `vision_tower.encoder...`, which vLLM refuses; the published checkpoints say
`vision_tower.vision_model...` and `language_model.model...`, which both read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
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

from serving.manifest import ImageMode
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


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a small LLaVA; the defaults are the demo's.

    LLaVA takes the output of the tower's last layer but one (`vision_feature_layer=-2`). Heads of
    the language model have 32 dimensions, the least that vLLM's CPU attention takes.
    """

    image_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE
    tower_width: int = 128
    tower_layers: int = 4
    tower_heads: int = 4
    text_width: int = 128
    text_mlp_width: int = 352
    text_layers: int = 3

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


DEMO_SHAPE = Shape()


def vision_config(shape: Shape = DEMO_SHAPE) -> CLIPVisionConfig:
    """A CLIP tower."""
    return CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        projection_dim=64,
    )


def llava_config(tokenizer: LlamaTokenizer, shape: Shape = DEMO_SHAPE) -> LlavaConfig:
    """The whole model; the vocabulary is padded to a multiple of 64, as the published one is."""
    text = LlamaConfig(
        hidden_size=shape.text_width,
        intermediate_size=shape.text_mlp_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_width // 32,
        num_key_value_heads=shape.text_width // 32,
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision_config(shape),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=shape.num_patches,
        tie_word_embeddings=False,
    )


def new_model(
    tokenizer: LlamaTokenizer, seed: int, shape: Shape = DEMO_SHAPE
) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    config = llava_config(tokenizer, shape)
    config._attn_implementation = "sdpa"
    return LlavaForConditionalGeneration(config)


def save_checkpoint(
    model: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    folder: Path,
    image_mode: ImageMode = "crop",
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
    save_preprocessor(folder, model.config.vision_config.image_size, image_mode)
    _write_json(folder / "processor_config.json", _processor(model.config))


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


def save_preprocessor(folder: Path, image_size: int, image_mode: ImageMode) -> None:
    """Writes how images become pixels: cut to a square, or padded to one as LLaVA-1.5's code does.

    It is all that `AutoImageProcessor.from_pretrained` needs.
    """
    _write_json(folder / "preprocessor_config.json", _preprocessor(image_size, image_mode))


def _preprocessor(image_size: int, image_mode: ImageMode) -> dict[str, Any]:
    pads = image_mode == "pad"
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
        **({"do_pad": True} if pads else {}),
    }


def _processor(config: LlavaConfig) -> dict[str, Any]:
    return {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": config.vision_config.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
