"""LoRA on a LLaVA, as vLLM can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from train.model import Llava
from train.recipes import Recipe

# Anchored on the language model: a bare `q_proj` would also hit the tower, which stays frozen.
# vLLM refuses LoRA biases, DoRA and `modules_to_save`.
_ATTENTION = "q_proj|k_proj|v_proj|o_proj"
_LINEAR = f"{_ATTENTION}|gate_proj|up_proj|down_proj"
_PROJECTOR = r".*multi_modal_projector\.linear_[12]"


def target_modules(recipe: Recipe) -> str:
    """Which weights get LoRA, as a regular expression over module names."""
    names = _ATTENTION if recipe.targets == "attention" else _LINEAR
    language = rf".*language_model.*\.({names})"
    return f"({language}|{_PROJECTOR})" if recipe.projector == "lora" else language


def add_lora(model: Llava, recipe: Recipe) -> Any:
    """Puts fresh LoRA layers into the model; returns PEFT's wrapper, which saves them."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_modules(recipe),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model.llava, config)


def save_lora(wrapper: Any, folder: Path, base_name: str) -> None:
    """Writes PEFT's files, without paths of this machine in them."""
    wrapper.peft_config["default"].base_model_name_or_path = base_name
    wrapper.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
