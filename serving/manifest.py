"""The manifest beside an adapter: what it was trained for and how well it does.

`train` writes it, `serving` reads it. An adapter without one is legal and gets the server's
defaults.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import AdapterError, ConfigError
from serving.structures import LabelStructure

MANIFEST_NAME = "sieve.json"
_SAMPLE_BYTES = 1 << 20

ImageMode = Literal["crop", "pad"]
"""How a picture becomes a square: by cutting its ends off, or by bars beside it."""


class Trained(BaseModel):
    """What an adapter was trained on and how; all of it optional.

    Attributes:
        data: the data source's name.
        split: the split's name.
        num_posts: how many posts.
        labels: posts of each label, by field.
        num_epochs: passes over the posts.
        rank: of the LoRA.
        alpha: of the LoRA.
        seed: of the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    split: str | None = None
    num_posts: int | None = None
    labels: dict[str, dict[str, int]] | None = None
    num_epochs: float | None = None
    rank: int | None = None
    alpha: float | None = None
    seed: int | None = None


class RetentionPoint(BaseModel):
    """Measured figures at one ratio with one selector, each in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    selector: str
    ratio: float = Field(gt=0.0, le=1.0)
    accuracy: float | None = None
    macro_f1: float | None = None
    weighted_f1: float | None = None


class Manifest(BaseModel):
    """What an adapter is for; every field may be missing.

    Attributes:
        label_structure: a structure's name, or a whole structure of the adapter's own.
        base_model: name of the checkpoint it was trained on, for people.
        base_fingerprint: `fingerprint` of that checkpoint; a server with another base refuses
            the adapter.
        image_mode: how pictures became squares in training; a server whose checkpoint does it
            otherwise refuses the adapter.
        recipe: name of the training recipe.
        trained: data, size and seed of the training.
        retention_ratio: the ratio requests get unless they ask for one, in (0, 1]: the smallest
            of `retention_curve` whose macro-F1 is within `margin` of that at 1.0.
        selector: the selector requests get unless they ask for one.
        margin: loss of macro-F1 that was allowed for `retention_ratio`.
        retention_curve: figures by ratio, of the field that counts (the last).
        notes: what a user should know, e.g. where training departs from a paper.
        quality: measured figures by test set, e.g. `{"balanced test, r=0.4": {"accuracy": 0.99}}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_structure: str | LabelStructure | None = None
    base_model: str | None = None
    base_fingerprint: str | None = None
    image_mode: ImageMode | None = None
    recipe: str | None = None
    trained: Trained | None = None
    retention_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    selector: str | None = None
    margin: float | None = Field(default=None, ge=0.0, le=1.0)
    retention_curve: list[RetentionPoint] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    quality: dict[str, dict[str, float]] = Field(default_factory=dict)

    @property
    def structure_name(self) -> str | None:
        """The structure's name, wherever it is defined."""
        if isinstance(self.label_structure, LabelStructure):
            return self.label_structure.name
        return self.label_structure

    def provenance(self) -> dict[str, Any]:
        """What clients see besides structure and retention: origin, figures, notes; no paths."""
        shown = {"base_model", "image_mode", "recipe", "trained", "margin", "retention_curve"}
        return self.model_dump(mode="json", exclude_none=True, include=shown | {"notes"})

    def save(self, folder: Path) -> None:
        """Writes the manifest into an adapter's folder."""
        values = self.model_dump(mode="json", exclude_none=True)
        values = {name: value for name, value in values.items() if value != []}
        text = json.dumps(values, indent=2)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of an adapter's folder, or None where there is none.

    Raises:
        AdapterError: there is one, and it is not valid.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"adapter {folder.name!r}: {MANIFEST_NAME} is not valid: {error}"
        ) from error


def read_image_mode(checkpoint: str | Path) -> ImageMode | None:
    """How a checkpoint's image processor makes a square; None where it stretches.

    `CLIPImageProcessor` cuts (Hugging Face's default), `LlavaImageProcessor` with `do_pad` adds
    bars of the mean colour, as LLaVA-1.5's own code does (`expand2square`).

    Raises:
        ConfigError: the checkpoint has no image processor that can be read.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(str(checkpoint), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{Path(checkpoint).name!r} has no readable preprocessor_config.json "
            f"({type(error).__name__}); copy the one of the checkpoint it was made from",
            param="model",
        ) from error
    if "Llava" in type(processor).__name__ and processor.do_pad:
        return "pad"
    return "crop" if processor.do_center_crop else None


def fingerprint(checkpoint: Path) -> str:
    """A hash that tells two checkpoints apart without reading all of their weights.

    Covers, of every safetensors file, its header (names, shapes, dtypes, offsets), its size and
    the first and last MiB of its tensor data.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {checkpoint}")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} ".encode() + file.read(header_size))
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
