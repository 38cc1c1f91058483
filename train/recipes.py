"""How an adapter is trained: recipes are functions that return a frozen config.

To add one: write a function that returns a `Recipe` and add a line to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.errors import ConfigError


class Recipe(BaseModel):
    """Everything that decides what a training does, apart from its data and base checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    structure: str = Field(description="label structure that is trained")
    rank: int = Field(default=128, ge=1, le=512, description="LoRA rank")
    alpha: int = Field(
        default=256, ge=1, description="LoRA alpha; updates are scaled by alpha / rank"
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="LoRA dropout")
    targets: Literal["attention", "linear"] = Field(
        default="linear",
        description="language-model weights with LoRA: attention's, or all linear ones",
    )
    projector: Literal["frozen", "lora", "full"] = Field(
        default="frozen",
        description="the projector stays, or gets LoRA that the server applies; full: `train fold`",
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="highest rate, AdamW")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="share of the steps with a rising rate"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    num_epochs: float = Field(default=1, gt=0, description="passes over the training posts")
    batch_size: int = Field(
        default=32, ge=1, description="posts an optimizer step, over all devices"
    )
    micro_batch_size: int = Field(default=8, ge=1, description="posts at once on a device")
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the frozen weights"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations, save memory"
    )
    balance: Literal["none", "sqrt-weights", "weights", "sampling"] = Field(
        default="none",
        description="rare labels count more in the loss (by inverse frequency or its root), or are "
        "drawn more often",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the answers' tokens")
    retention_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of visual tokens in training; the paper keeps all",
    )
    selector: str = Field(default="cls", description="which are kept, where the ratio is below 1")
    group_by_length: bool = Field(default=True, description="posts of like length in a batch")
    evaluate_every: float = Field(
        default=1.0,
        gt=0,
        description="epochs between evaluations on the dev posts; at the end in any case",
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="the last weights, or those of the best dev macro-F1"
    )
    patience: int = Field(
        default=0, ge=0, description="evaluations without a better one; 0: never stop"
    )
    save_every: int = Field(
        default=0, ge=0, description="steps between checkpoints; 0: at evaluations"
    )
    cache: Literal["auto", "always", "never"] = Field(
        default="auto", description="tower features kept on disk and computed once"
    )
    seed: int = Field(default=0, ge=0)
    notes: tuple[str, ...] = Field(default=(), description="what the manifest should say")

    @property
    def weight_power(self) -> float:
        """Power of a label's inverse frequency that is its weight in the loss."""
        return {"weights": 1.0, "sqrt-weights": 0.5}.get(self.balance, 0.0)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.patience and self.keep == "last":
            raise ValueError("patience needs keep='best'")
        if self.retention_ratio < 1 and self.cache == "never":
            raise ValueError("retention_ratio below 1 needs the cache: [CLS] scores are kept there")
        return self


def llavac() -> Recipe:
    """LLaVAC as its paper writes it: three labels, attention weights, rank 128, one epoch."""
    return Recipe(
        name="llavac", structure="llavac", targets="attention", learning_rate=2e-5, dropout=0.0
    )


def llavac_script() -> Recipe:
    """The same with LLaVA's own LoRA script: all language-model linears, 2e-4.

    The script also trains the whole projector at 2e-5, which no adapter can carry: it stays here.

    https://github.com/haotian-liu/LLaVA/blob/main/scripts/v1_5/finetune_lora.sh
    """
    return llavac().model_copy(
        update={
            "name": "llavac-script",
            "targets": "linear",
            "learning_rate": 2e-4,
            "dropout": 0.05,
            "notes": ("LLaVA's script also trains the whole projector; here it stays frozen",),
        }
    )


def llavac_mo() -> Recipe:
    """LLaVAC's ablation: the multimodal label alone."""
    return llavac().model_copy(update={"name": "llavac-mo", "structure": "multimodal"})


def robust() -> Recipe:
    """'Towards Robust Multimodal Sentiment Detection with LLaVA': one label, the best of 10 epochs.

    The paper tunes the whole language model and the projector.
    """
    return Recipe(
        name="robust",
        structure="sentiment",
        projector="lora",
        num_epochs=10,
        batch_size=16,
        keep="best",
        notes=(
            "the paper tunes the whole language model and projector; here both are tuned by LoRA",
        ),
    )


def projector() -> Recipe:
    """LLaVA's first stage, for `train fold`: the projector alone, 1e-3, one epoch.

    'Visual Instruction Tuning', section 4.2; batches of 256 there, of 32 here: data are few.
    """
    return Recipe(
        name="projector", structure="llavac", projector="full", learning_rate=1e-3, dropout=0.0
    )


def demo() -> Recipe:
    """Adapters of the demo's size, for the small checkpoints that train from nothing."""
    return Recipe(
        name="demo",
        structure="llavac",
        rank=16,
        alpha=32,
        dropout=0.0,
        learning_rate=3e-3,
        weight_decay=0.01,
        warmup=0.1,
        num_epochs=3,
        batch_size=48,
        micro_batch_size=48,
        dtype="float32",
    )


def small() -> Recipe:
    """For the small LLaVA of `train base`: little rank, much regularisation, weighted labels."""
    return Recipe(
        name="small",
        structure="llavac",
        rank=16,
        alpha=32,
        dropout=0.1,
        learning_rate=2e-3,
        warmup=0.1,
        num_epochs=2,
        micro_batch_size=32,
        dtype="float32",
        balance="sqrt-weights",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "llavac": llavac,
    "llavac-script": llavac_script,
    "llavac-mo": llavac_mo,
    "robust": robust,
    "demo": demo,
    "small": small,
    "projector": projector,
}


def make_recipe(name: str, *, file: Path | None = None, settings: Sequence[str] = ()) -> Recipe:
    """A recipe with a YAML file's and then the command line's changes.

    Args:
        name: one of `RECIPES`.
        file: a mapping of field to value.
        settings: `field=value`, values as YAML reads them.

    Raises:
        ConfigError: no such recipe or field, or a value that is not allowed.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is unknown; allowed are {list(RECIPES)}")
    changes = {**(_read_yaml(file) if file else {}), **_read_settings(settings)}
    return change_recipe(RECIPES[name](), changes)


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values.

    Raises:
        ConfigError: no such field, or a value that is not allowed.
    """
    try:
        return Recipe.model_validate({**recipe.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(Recipe.model_fields)
            raise ConfigError(f"recipe has no {where!r}; allowed are {allowed}") from error
        message = first["msg"].removeprefix("Value error, ")
        given = f"{where}={first['input']!r}: " if where else ""
        raise ConfigError(f"recipe {recipe.name!r}: {given}{message}") from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {error}", param="config") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected a mapping of recipe field to value")
    return content


def _read_settings(settings: Sequence[str]) -> dict[str, Any]:
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r}: expected FIELD=VALUE, e.g. rank=64")
        # YAML 1.1 reads 1e-3 as a text.
        try:
            found[name] = float(value) if "e" in value.lower() else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            found[name] = value
    return found
