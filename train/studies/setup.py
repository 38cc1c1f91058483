"""What a study is run on, and what makes two studies the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.manifest import fingerprint, read_image_mode
from serving.posts import Post
from serving.structures import LabelStructure
from train.evaluation import RATIOS
from train.fit import Material, describe_posts
from train.recipes import Recipe


class Options(BaseModel):
    """Settings that only some studies have; `train.studies.catalog` says which."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    also_single: bool = False
    to: Path | None = None
    to_split: str = "dev"
    to_train_split: str | None = None
    to_fields: str | None = None
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    ratios: tuple[float, ...] = RATIOS
    selectors: tuple[str, ...] = tuple(SELECTORS)
    also_base: Path | None = None
    skip_unlabelled: bool = False
    skip_broken: bool = False
    limit: int | None = Field(default=None, ge=1)

    @field_validator("shares", "ranks", "ratios", "selectors", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("shares", "ranks", "ratios", "selectors")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("at least one value, each once")
        return value


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a study is run on.

    Attributes:
        study: its name.
        base: checkpoint that adapters are trained for.
        out: the study's folder.
        cache: where the tower's features are kept, for all cells.
        dtype: what models answer in.
        seeds: of the trainings.
        recipe: with the user's changes; its seed is replaced.
        structure: the recipe's.
        structures: all that are known, by name.
        material: posts to train on and to answer.
        options: of this study.
    """

    study: str
    base: Path
    out: Path
    cache: Path
    dtype: str
    seeds: tuple[int, ...]
    recipe: Recipe
    structure: LabelStructure
    structures: Mapping[str, LabelStructure]
    material: Material
    options: Options

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"--seeds {list(self.seeds)}: at least one, each once", param="seeds")
        if not self.material.dev:
            raise ConfigError("a study needs posts to answer: name --dev-split", param="dev_split")

    @property
    def field(self) -> str:
        """The field that counts: the structure's last."""
        return list(self.structure.fields)[-1]

    def describe(self) -> dict[str, Any]:
        """What two runs must share to be one study, ready for JSON."""
        material = self.material
        return {
            "study": self.study,
            **describe_base(self.base),
            "dtype": self.dtype,
            "seeds": list(self.seeds),
            "recipe": self.recipe.model_dump(mode="json", exclude={"seed"}),
            "label_structure": self.structure.model_dump(mode="json"),
            "data": {
                **material.source,
                "train": describe_posts(self.structure, material.train),
                "dev": describe_posts(self.structure, material.dev),
                "digest": digest_posts([*material.train, *material.dev]),
            },
        }


def describe_base(base: Path) -> dict[str, Any]:
    """A checkpoint's name, fingerprint and image mode.

    Raises:
        ConfigError: it is no checkpoint with weights and an image processor.
    """
    mode = read_image_mode(base)
    try:
        known = fingerprint(base) if base.is_dir() else None
    except FileNotFoundError as error:
        raise ConfigError(f"--base {base}: {error}", param="base") from error
    return {
        "base": base.name if base.is_dir() else str(base),
        "base_fingerprint": known,
        "image_mode": mode or "stretch",
    }


IMAGE_MODES = {
    "crop": "cropped",
    "pad": "padded to a square",
    "stretch": "stretched to a square",
}


def digest_posts(posts: Iterable[Post]) -> str:
    """Which posts, in short: ids, texts and labels."""
    digest = hashlib.sha256()
    for post in posts:
        digest.update(json.dumps([post.id, post.text, dict(post.labels)], sort_keys=True).encode())
    return digest.hexdigest()[:16]
