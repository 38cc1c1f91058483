"""A LLaVA-1.5 checkpoint in Hugging Face, for training and evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.config import check_checkpoint
from serving.constraint import Constraint, compile_structure
from serving.errors import ConfigError
from serving.prompts import encode_answer, render_chat
from serving.structures import LabelStructure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Llava:
    """A loaded checkpoint, with or without an adapter.

    Attributes:
        llava: the `LlavaForConditionalGeneration`; an adapter's layers are in it.
        tokenizer: with the checkpoint's chat template.
        processor: the checkpoint's image processor; it decides whether images are cropped or
            padded.
        checkpoint: where it came from.
    """

    llava: Any
    tokenizer: Any
    processor: Any
    checkpoint: Path

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.llava.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.llava.dtype

    @property
    def config(self) -> Any:
        """The checkpoint's `LlavaConfig`."""
        return self.llava.config

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.llava.model.vision_tower

    @property
    def num_patches(self) -> int:
        """P."""
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    @property
    def feature_layer(self) -> int:
        """Index of the tower layer whose output becomes the features; -2 is the last but one's."""
        layer = self.config.vision_feature_layer
        return int(layer - 1 if layer > 0 else self.config.vision_config.num_hidden_layers + layer)

    def project(self, features: Tensor) -> Tensor:
        """From `(..., D)` features to the language model's `(..., E)` rows."""
        return self.llava.model.multi_modal_projector(features)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Rows of token ids."""
        return self.llava.get_input_embeddings()(ids)

    def constraint(self, structure: LabelStructure) -> Constraint:
        """The structure in this tokenizer's canonical ids, as the server compiles it.

        Raises:
            ConfigError: the chat template does not keep prompt and answer apart, or labels do not
                end on token boundaries.
        """
        prompt = render_chat(self.tokenizer, "", 0)

        def encode(answer: str) -> list[int]:
            try:
                return encode_answer(self.tokenizer, prompt, answer)
            except ValueError as error:
                raise ConfigError(str(error)) from error

        return compile_structure(structure, encode)


def load_llava(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Llava:
    """Loads a checkpoint and an adapter, in evaluation mode.

    Args:
        checkpoint: folder or Hugging Face id of a llava-1.5 checkpoint.
        adapter: folder of a PEFT adapter for it.
        dtype: float32 to compare numbers, bfloat16 for speed.
        device: by default the first GPU, or the CPU.

    Raises:
        ConfigError: it is not a LLaVA-1.5 checkpoint, or the adapter does not load.
    """
    from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _check_config(checkpoint)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    llava = LlavaForConditionalGeneration.from_pretrained(
        str(checkpoint), dtype=dtype, attn_implementation="sdpa"
    )
    if adapter is not None:
        _add_adapter(llava, adapter)
    tokenizer = AutoProcessor.from_pretrained(str(checkpoint)).tokenizer
    tokenizer.chat_template = tokenizer.chat_template or _chat_template(checkpoint)
    return Llava(
        llava=llava.to(where).eval(),
        tokenizer=tokenizer,
        processor=AutoImageProcessor.from_pretrained(str(checkpoint)),
        checkpoint=checkpoint,
    )


def _check_config(checkpoint: Path) -> None:
    from transformers import AutoConfig

    if checkpoint.exists() and not (checkpoint / "config.json").is_file():
        raise ConfigError(
            f"--base {checkpoint} is not a checkpoint: it has no config.json", param="base"
        )
    try:
        config = AutoConfig.from_pretrained(str(checkpoint))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--base {str(checkpoint)!r} is neither a folder nor a checkpoint that can be fetched",
            param="base",
        ) from error
    try:
        check_checkpoint(config)
    except ValueError as error:
        raise ConfigError(f"--base {str(checkpoint)!r}: {error}", param="base") from error


def _chat_template(checkpoint: Path) -> str:
    from transformers import AutoProcessor

    template = AutoProcessor.from_pretrained(str(checkpoint)).chat_template
    if not template:
        raise ConfigError(f"{str(checkpoint)!r} has no chat template", param="base")
    return str(template)


def _add_adapter(llava: Any, adapter: Path) -> None:
    from peft import PeftModel

    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(
            f"--adapter {adapter} is not an adapter: it has no adapter_config.json", param="adapter"
        )
    try:
        json.loads(path.read_text(encoding="utf-8"))
        # PEFT puts its layers into `llava` itself; the wrapper is not needed after that.
        PeftModel.from_pretrained(llava, str(adapter))
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ConfigError(
            f"--adapter {adapter} does not load on this base: {str(error)[:300]}", param="adapter"
        ) from error
