"""Adapters on disk: found, checked before the engine sees them, described to clients.

vLLM ignores what it cannot place: keys of a text-only model, alphas by pattern, an adapter of
zeros all load and do nothing. Such adapters are refused here, with the reason.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serving.errors import AdapterError
from serving.manifest import (
    MANIFEST_NAME,
    ImageMode,
    Manifest,
    fingerprint,
    load_manifest,
    read_image_mode,
)
from serving.protocol import Adapter, LoraRoom
from serving.settings import Settings
from serving.weights import pickle_complaint

logger = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM allocates for."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(
    r"base_model\.model\.(?:model\.language_model|language_model\.model)\.layers\.(\d+)\."
    r"(?:self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
_PROJECTOR_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?multi_modal_projector\.(linear_[12])"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
_SQUARE = {"crop": "cut to a square", "pad": "padded to a square", None: "stretched to a square"}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What an adapter must fit.

    Attributes:
        config: the checkpoint's `config.json`.
        fingerprint: of the checkpoint, or None where it is not a local folder.
        image_mode: what its image processor does to get a square; None where it stretches.
    """

    config: Mapping[str, Any]
    fingerprint: str | None
    image_mode: ImageMode | None


@dataclass(frozen=True, kw_only=True)
class InstalledAdapter:
    """An adapter that passed the checks, with its manifest (empty where it has none)."""

    adapter: Adapter
    manifest: Manifest


def read_base(model: str) -> BaseModel:
    """Facts of a base checkpoint, a local folder or a Hugging Face id.

    Raises:
        ConfigError: it has no image processor.
    """
    from transformers import AutoConfig

    folder = Path(model)
    return BaseModel(
        config=AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict(),
        fingerprint=fingerprint(folder) if folder.is_dir() else None,
        image_mode=read_image_mode(model),
    )


def lora_room(settings: Settings, adapters: Sequence[Adapter]) -> LoraRoom | None:
    """Room for adapters, by the settings or as these need; None where there will be none."""
    if not adapters and settings.adapters_folder is None:
        return None
    needed = settings.max_lora_rank or max((adapter.rank for adapter in adapters), default=16)
    max_loras = settings.max_loras or max(2, min(len(adapters), 8))
    return LoraRoom(
        max_rank=next(rank for rank in RANKS if rank >= needed),
        max_loras=max_loras,
        max_cpu_loras=max(max_loras, settings.max_cpu_loras or max(8, min(len(adapters), 64))),
        has_projector=settings.projector_lora or any(a.has_projector for a in adapters),
    )


def check_adapter(folder: Path, base: BaseModel, name: str | None = None) -> InstalledAdapter:
    """Everything that can be known about an adapter before it is loaded.

    One without a manifest is served with the server's defaults, and the log says so. Its name is
    that of its folder unless one is given.

    Raises:
        AdapterError: it would fail in the engine, or load and do nothing.
    """
    name = folder.name if name is None else name
    if not _NAME.fullmatch(name):
        raise AdapterError(f"adapter {name!r}: the name must be letters, digits, '.', '_' and '-'")
    complaint = pickle_complaint(f"adapter {name!r}", (path.name for path in folder.glob("*")))
    if complaint is not None:
        raise AdapterError(complaint)
    config = _read_config(folder, name)
    _check_config(name, config)
    manifest = load_manifest(folder)
    if manifest is None:
        logger.warning(
            "adapter %r has no %s: its requests get the server's label structure, retention and "
            "selector unless they ask for others",
            name,
            MANIFEST_NAME,
        )
        manifest = Manifest()
    _check_base(name, manifest, base)
    keys = _check_weights(name, folder, config, base)
    adapter = Adapter(
        name=name,
        path=str(folder.resolve()),
        rank=int(config["r"]),
        has_projector=any(_PROJECTOR_KEY.fullmatch(key) for key in keys),
    )
    return InstalledAdapter(adapter=adapter, manifest=manifest)


def _check_base(name: str, manifest: Manifest, base: BaseModel) -> None:
    trained_on = manifest.base_fingerprint
    if trained_on and base.fingerprint and trained_on != base.fingerprint:
        raise AdapterError(
            f"adapter {name!r} was trained on another base ({manifest.base_model!r}); serve that "
            "checkpoint, or train the adapter again on this one"
        )
    if manifest.image_mode and manifest.image_mode != base.image_mode:
        raise AdapterError(
            f"adapter {name!r} was trained on images {_SQUARE[manifest.image_mode]} "
            f"(image_mode={manifest.image_mode!r}), and this checkpoint's preprocessor_config.json "
            f"has them {_SQUARE[base.image_mode]}; serve the checkpoint it was trained on"
        )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter {name!r}: adapter_config.json cannot be read: {type(error).__name__}"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int):
        raise AdapterError(f"adapter {name!r}: adapter_config.json has no LoRA rank 'r'")
    return config


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuses what vLLM rejects or silently ignores."""
    init = config.get("init_lora_weights", True)
    reasons = {
        f"peft_type={config.get('peft_type')!r}, must be LORA": config.get("peft_type") != "LORA",
        f"rank {config['r']}, must be 1 to {RANKS[-1]}": not 1 <= config["r"] <= RANKS[-1],
        "use_dora": config.get("use_dora"),
        f"bias={config.get('bias')!r}, must be 'none'": config.get("bias", "none") != "none",
        f"modules_to_save={config.get('modules_to_save')}": config.get("modules_to_save"),
        "alpha_pattern (vLLM ignores it)": config.get("alpha_pattern"),
        "rank_pattern (vLLM ignores it)": config.get("rank_pattern"),
        f"init_lora_weights={init!r} (changes base weights)": isinstance(init, str)
        and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise AdapterError(f"adapter {name!r} cannot be served: {'; '.join(found)}")


def _check_weights(
    name: str, folder: Path, config: Mapping[str, Any], base: BaseModel
) -> list[str]:
    """Names of the adapter's weights, all of which fit."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise AdapterError(f"adapter {name!r}: adapter_model.safetensors is missing")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_keys(name, keys, int(config["r"]), file, base)
            _check_acts(name, keys, file)
            return keys
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"adapter {name!r}: adapter_model.safetensors is broken ({type(error).__name__})"
        ) from error


def _check_keys(name: str, keys: list[str], rank: int, file: Any, base: BaseModel) -> None:
    for key in keys:
        place = _place(key, base)
        if place is None:
            frozen = " (the vision tower is always frozen)" if "vision_tower" in key else ""
            raise AdapterError(
                f"adapter {name!r} has weights for {key!r}, which the base model has no place "
                f"for, so it would be ignored{frozen}; train it on the whole LLaVA with "
                "target_modules anchored on language_model, e.g. '.*language_model.*q_proj', and "
                "on multi_modal_projector if you like"
            )
        (rows, columns), factor = place
        expected = [rank, columns] if factor == "A" else [rows, rank]
        found = list(file.get_slice(key).get_shape())
        if found != expected:
            raise AdapterError(
                f"adapter {name!r}: {key!r} has shape {found}, the base model and rank {rank} "
                f"need {expected}; it was trained on another base"
            )
    if not keys:
        raise AdapterError(f"adapter {name!r} has no weights")


def _place(key: str, base: BaseModel) -> tuple[tuple[int, int], str] | None:
    """Rows and columns of the layer that a weight is for, and which factor it is ('A', 'B')."""
    text = base.config["text_config"]
    match = _KEY.fullmatch(key)
    if match is not None and int(match[1]) < text["num_hidden_layers"]:
        return _module_shapes(text)[match[2]], match[3]
    match = _PROJECTOR_KEY.fullmatch(key)
    if match is not None:
        hidden = text["hidden_size"]
        inner = base.config["vision_config"]["hidden_size"] if match[1] == "linear_1" else hidden
        return (hidden, inner), match[2]
    return None


def _module_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each projection of the text model."""
    hidden, inner, heads = (
        text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    )  # fmt: skip
    width = text.get("head_dim") or hidden // heads
    kv = width * (text.get("num_key_value_heads") or heads)
    return {
        "q_proj": (width * heads, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, width * heads),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _check_acts(name: str, keys: list[str], file: Any) -> None:
    """At least one module's product B A must not be zero."""
    for key in keys:
        if ".lora_A" not in key or key.replace(".lora_A", ".lora_B") not in keys:
            continue
        first, second = file.get_tensor(key), file.get_tensor(key.replace(".lora_A", ".lora_B"))
        if (second.float() @ first.float()).abs().max() > 0:
            return
    raise AdapterError(
        f"adapter {name!r} would do nothing: all of its products B A are zero (was it saved before "
        "training?)"
    )
