"""A LLaVA-1.5 without weights: config, processor and tokenizer, for `load_format="dummy"`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.flops import Shape
from bench.outcome import BenchError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGE_TOKEN_ID = 32000
_SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = ("▁positive", "▁neutral", "▁negative")
"""One piece each in Llama's tokenizer."""


def write_shape(folder: Path, shape: Shape, tokenizer: Path | None) -> Path:
    """What vLLM reads of a checkpoint, except for its weights.

    Args:
        folder: an existing, empty folder.
        shape: the model's sizes.
        tokenizer: a folder with Llama's tokenizer; None makes a small one.

    Raises:
        BenchError: the tokenizer is not Llama's.
    """
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    if tokenizer is None:
        _make_tokenizer().save_pretrained(folder)
    else:
        _read_tokenizer(tokenizer).save_pretrained(folder)
    _write_processor(folder, shape)
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_mlp,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=4096,
        pad_token_id=IMAGE_TOKEN_ID + 1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    architecture = {"architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16"}
    return {**config.to_dict(), **architecture}


def _make_tokenizer() -> Any:
    """One token a byte, labels of one token as in Llama's, then filler."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("".join(_WORDS)))
    # Each word grows from its first letter; a start that words share is one piece.
    starts = [word[:end] for word in _WORDS for end in range(2, len(word) + 1)]
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += dict.fromkeys(starts)
    pieces += [f"▁filler{index}" for index in range(len(pieces), IMAGE_TOKEN_ID)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [(start[:-1], start[-1]) for start in dict.fromkeys(starts)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    unknown, bos, eos = _SPECIAL
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=bos, eos_token=eos
    )
    return _with_image_token(made)


def _read_tokenizer(folder: Path) -> Any:
    from transformers import LlamaTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise BenchError(
            f"--tokenizer {folder}: no tokenizer.model or tokenizer.json there; give the folder "
            "of Llama's tokenizer, or leave the option out"
        )
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    if len(tokenizer) != IMAGE_TOKEN_ID:
        raise BenchError(
            f"--tokenizer {folder}: {len(tokenizer)} tokens; Llama's has {IMAGE_TOKEN_ID}"
        )
    return _with_image_token(tokenizer)


def _with_image_token(tokenizer: Any) -> Any:
    """Ids 32000 and 32001, as published."""
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.image_token = "<image>"
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN_ID
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write_processor(folder: Path, shape: Shape) -> None:
    size = shape.image_size
    image_processor = {
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
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": shape.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
