"""Tiny random checkpoints in the published llava-1.5 format, made on the spot.

`build_published_like` has the processor, positions, tokenizer shape and (old) weight names of
llava-hf/llava-1.5-7b-hf; only widths and depths are small.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_WORDS = (
    "USER ASSISTANT Text What is the sentiment of this post image text both together positive "
    "neutral negative a great very good bad day in park , : ? . ! very good very bad"
)


def build_published_like(folder: Path, *, seed: int = 0, pad_to_square: bool = False) -> Path:
    """A random LLaVA-1.5 of 336 px, patch 14, 577 positions and 32,064 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention starts at a head width of 32
        num_key_value_heads=2,
        vocab_size=32064,
        max_position_embeddings=4096,
        pad_token_id=32001,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    _use_published_names(folder / "model.safetensors")
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(stored, indent=2))
    write_tokenizer(folder)
    write_processor(folder, pad_to_square=pad_to_square)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Larger weights, so that answers depend on every patch and attention is not uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
                if ".q_proj." in name or ".k_proj." in name:
                    parameter.mul_(3.0)


def _use_published_names(path: Path) -> None:
    """Weight names of the published checkpoint (before transformers 4.52)."""
    renamed = {}
    for name, weight in load_file(path).items():
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        renamed[name] = weight.contiguous()
    save_file(renamed, path, metadata={"format": "pt"})


def write_tokenizer(folder: Path, size: int = 32000) -> None:
    """A Llama-style BPE (leading space pieces, byte fallback) of exactly the published shape."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
        max_token_length=16,
    )
    # One word a text: a piece never spans two words, as in SentencePiece.
    tokenizer.train_from_iterator(_WORDS.split() * 4, trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for filler in range(len(vocab), size):
        vocab[f"▁filler{filler}"] = filler
    state["added_tokens"] = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in [*enumerate(special), (size, "<image>"), (size + 1, "<pad>")]
    ]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "extra_special_tokens": {"image_token": "<image>"},
                "image_token": "<image>",
                "processor_class": "LlavaProcessor",
                "model_max_length": 4096,
            }
        )
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})
    )


def write_processor(folder: Path, *, pad_to_square: bool = False, size: int = 336) -> None:
    """The published image processing (centre-crop), or LLaVA-1.5's own padding to a square."""
    image_processor: dict[str, object] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    if pad_to_square:
        image_processor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**image_processor, "processor_class": "LlavaProcessor"}, indent=2)
    )
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "image_token": "<image>",
                "patch_size": 14,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
            indent=2,
        )
    )


def build_adapter(
    checkpoint: Path, folder: Path, *, seed: int, rank: int = 8, scale: float = 0.3, **lora: object
) -> Path:
    """A random LoRA adapter that changes answers (its B factors are not zero)."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    pattern = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = LoraConfig(**{"r": rank, "lora_alpha": rank, "target_modules": pattern, **lora})
    peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * scale)
    peft_model.save_pretrained(folder)
    return folder
