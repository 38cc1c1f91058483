"""Settings that every process of an engine must see alike.

They travel in `hf_overrides`, so that the API process (placeholders, cache keys) and the worker
(tower) read the same values from `hf_config`, in process and on Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patches.selection import SELECTORS, num_kept

ARCHITECTURE = "SieveLlavaForConditionalGeneration"
CONFIG_KEY = "sieve"
RATIO_KEY = "retention_ratio"
SELECTOR_KEY = "selector"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How many patches a request keeps, and which.

    Raises:
        ValueError: the ratio is not a number in (0, 1], or there is no such selector.
    """

    ratio: float = 1.0
    selector: str = "cls"

    def __post_init__(self) -> None:
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not math.isfinite(self.ratio) or not 0.0 < self.ratio <= 1.0:
            raise ValueError(
                f"{RATIO_KEY}={self.ratio!r} is not allowed: it is the share of visual tokens "
                "kept, a number above 0 and up to 1, e.g. 0.4"
            )
        if self.selector not in SELECTORS:
            raise ValueError(
                f"{SELECTOR_KEY}={self.selector!r} is unknown; allowed are {sorted(SELECTORS)}"
            )

    def num_kept(self, num_patches: int) -> int:
        """Kept count of one image."""
        return num_kept(num_patches, self.ratio)

    def processor_kwargs(self) -> dict[str, object]:
        """The same, as a request's `mm_processor_kwargs`."""
        return {RATIO_KEY: self.ratio, SELECTOR_KEY: self.selector}


@dataclass(frozen=True, kw_only=True)
class SieveConfig:
    """What an engine is started with.

    Attributes:
        retention: what requests get that do not ask.
        tower_batch_size: most images in one call of the tower. vLLM's encoder budget counts kept
            tokens, so at a low ratio a hundred images may come at once, a batch that memory
            profiling never saw.
        tower_cache_mib: features that a worker keeps of the images it saw last, for requests that
            keep other patches of them; 0 keeps none.
    """

    retention: Retention = field(default_factory=Retention)
    tower_batch_size: int = 8
    tower_cache_mib: int = 64

    def hf_overrides(self) -> dict[str, object]:
        """The engine argument that selects the architecture and carries these settings."""
        return {"architectures": [ARCHITECTURE], CONFIG_KEY: asdict(self)}


def read_config(hf_config: Any) -> SieveConfig:
    """The settings an engine was started with; defaults where it was started by hand."""
    stored = getattr(hf_config, CONFIG_KEY, None)
    if stored is None:
        return SieveConfig()
    return SieveConfig(
        retention=Retention(**stored["retention"]),
        tower_batch_size=stored["tower_batch_size"],
        tower_cache_mib=stored["tower_cache_mib"],
    )


def resolve_retention(kwargs: Mapping[str, object], default: Retention) -> Retention:
    """A request's retention: what its `mm_processor_kwargs` say, else the engine's default.

    Raises:
        ValueError: the request asks for what is not allowed.
    """
    return Retention(
        ratio=kwargs.get(RATIO_KEY, default.ratio),  # type: ignore[arg-type]
        selector=kwargs.get(SELECTOR_KEY, default.selector),  # type: ignore[arg-type]
    )


def check_checkpoint(config: Any) -> None:
    """Refuses checkpoints that are not LLaVA-1.5-like, before anything is built.

    Raises:
        ValueError: names the setting, its value and what is supported.
    """
    if config.vision_config.model_type != "clip_vision_model":
        raise ValueError(
            f"vision_config.model_type={config.vision_config.model_type!r} is not supported; "
            "the tower must be CLIP's (LLaVA-1.5)"
        )
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not "
            "supported; it must be 'default' (patches without [CLS])"
        )
    num_layers = config.vision_config.num_hidden_layers
    if config.vision_feature_layer not in (-1, -2, num_layers, num_layers - 1):
        raise ValueError(
            f"vision_feature_layer={config.vision_feature_layer!r} is not supported; [CLS] "
            "attention of all layers needs features of the last or the last but one (-2)"
        )
