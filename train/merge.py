"""A base checkpoint with an adapter's weights added in, in the published llava-1.5 format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from serving.errors import ConfigError
from train.demo.checkpoint import published_name

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes the merged checkpoint: `W + alpha / r * B A`, everything else as the base has it.

    The sum is made in float32 and stored in the base's own precision; in 16 bits it rounds, so its
    answers equal the adapter's only as far as those carry.

    Args:
        base: checkpoint folder or Hugging Face id.
        adapter: PEFT folder.
        out: an empty folder, or none.

    Raises:
        ConfigError: the adapter does not load on the base.
    """
    source = base if base.is_dir() else Path(snapshot_download(str(base)))
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{adapter} does not merge into {base}: {str(error)[:300]}") from error
    dtype = _stored_dtype(source)
    weights = {
        published_name(name): value.detach().to(dtype).contiguous()
        for name, value in merged.state_dict().items()
    }
    others = shutil.ignore_patterns(*_WEIGHTS, ".*")
    shutil.copytree(source, out, ignore=others, dirs_exist_ok=True)
    save_torch_state_dict(weights, out, metadata={"format": "pt"})


def _stored_dtype(checkpoint: Path) -> torch.dtype:
    """The precision that `config.json` says the weights are stored in; float32 where it is mute."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, name)
