"""What `python -m serving batch` was asked for."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.batch.tables import FORMATS
from serving.cascade import Cascade
from serving.catalogue import Choices
from serving.errors import ConfigError
from serving.posts import Duplicates

DUPLICATES = typing.get_args(Duplicates)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """A batch: what to label, how, and where the rows go.

    Attributes:
        data: a folder, a file, or a URL that fsspec reads.
        out: folder of the run.
        models: adapters, or the base model; empty for the server's default.
        abstain: rows whose confidence is lower abstain and come into the review queue.
        duplicates: what an id that comes twice means, one of `DUPLICATES`.
        shard_size: posts a published file.
        concurrency: posts in the engine at once.
        workers: processes that read and decode; 0 for one a core, less one.

    Raises:
        ConfigError: a value is not allowed.
    """

    data: str
    out: Path
    format: str = "jsonl"
    models: tuple[str, ...] = ()
    retention: float | None = None
    selector: str | None = None
    label_structure: str | None = None
    cascade: tuple[float, ...] | None = None
    confidence: float | None = None
    abstain: float | None = None
    split: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    duplicates: Duplicates = "error"
    shard_size: int = 1000
    concurrency: int = 64
    workers: int = 0
    retry_failed: bool = False
    engines: int = 0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name in ("shard_size", "concurrency"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more", param=name)
        self._check_choice("format", FORMATS)
        self._check_choice("duplicates", DUPLICATES)
        if self.abstain is not None and not 0 < self.abstain <= 1:
            raise ConfigError(
                f"abstain={self.abstain} must be above 0 and up to 1", param="abstain"
            )
        twice = [model for model in self.models if self.models.count(model) > 1]
        if twice:
            raise ConfigError(f"model={twice[0]!r} is named twice", param="model")
        _ = self.steps

    def _check_choice(self, name: str, allowed: Any) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(
                f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}", param=name
            )

    @property
    def steps(self) -> Cascade | None:
        """The cascade, if one is asked for."""
        return Cascade.asked(self.cascade, self.confidence, self.retention)

    @property
    def choices(self) -> Choices:
        """What every post asks for, but the model."""
        return Choices(
            label_structure=self.label_structure,
            retention_ratio=self.retention,
            selector=self.selector,
        )

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) - 1)

    @property
    def is_remote(self) -> bool:
        """Whether the data is behind a URL."""
        return "://" in self.data

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on; JSON values."""
        names = ("format", "label_structure", "retention", "selector", "confidence", "abstain")
        return {
            "data": self.data if self.is_remote else str(Path(self.data).resolve()),
            **{name: getattr(self, name) for name in names},
            "model": list(self.models),
            "cascade": list(self.cascade) if self.cascade else None,
            "split": self.split,
            "fields": dict(self.fields),
            "duplicates": self.duplicates,
            "shard_size": self.shard_size,
        }
