"""Settings of the application on Ray: those of any server, and how many of what."""

from __future__ import annotations

import math
import os
import re
from typing import Self

from pydantic import Field, model_validator

from serving.settings import Settings

ENGINE_CLASS = "serving.engine:VllmEngine"


class RayAppSettings(Settings):
    """Everything `python -m serving --ray` and `serve run serving.ray_app:app` can be told."""

    replicas: str = Field(
        "1", description="engines: a number, or least-most ('1-3', '0-3') to follow the load"
    )
    ingress_replicas: int = Field(1, gt=0, description="HTTP sides")
    replica_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves for an engine")
    replica_gpus: float = Field(0.0, ge=0, description="GPUs that Ray reserves for an engine")
    max_ongoing: int | None = Field(
        None, gt=0, description="requests sent to an engine at once; by default --max-num-seqs"
    )
    visual_tokens_per_replica: float | None = Field(
        None,
        gt=0,
        description="kept visual tokens in flight that one engine carries; more start another (by "
        "default those of --max-ongoing images at ratio 1.0, halved)",
    )
    target_wait_s: float = Field(
        1.0, gt=0, description="wait for an engine above which another one is started"
    )
    upscale_delay_s: float = Field(1.0, ge=0, description="seconds that more load must last")
    downscale_delay_s: float = Field(60.0, ge=0, description="seconds that less load must last")
    zero_delay_s: float = Field(
        300.0, ge=0, description="seconds without a request until the last engine stops ('0-3')"
    )
    ray_address: str | None = Field(
        None, description="cluster to join ('auto', 'host:port'); without it Ray starts here"
    )
    ray_cpus: int | None = Field(
        None,
        gt=0,
        description="CPUs that a Ray started here believes in; by default the machine's, "
        "or as many as all engines reserve",
    )

    @model_validator(mode="after")
    def _readable_replicas(self) -> Self:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.replicas)
        if match is None or self.most_replicas < max(1, self.least_replicas):
            raise ValueError(
                f"replicas={self.replicas!r} must be a number above 0 or a range such as '1-3'"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Fewest engines."""
        return int(self.replicas.split("-")[0])

    @property
    def most_replicas(self) -> int:
        """Most engines."""
        return int(self.replicas.split("-")[-1])

    @property
    def ongoing(self) -> int:
        """Requests at one engine; near `max_num_seqs`, or a hot adapter stays on one engine."""
        return self.max_ongoing or self.max_num_seqs

    @property
    def own_ray_cpus(self) -> int:
        """CPUs of a Ray started here: all engines fit, though they share fewer cores."""
        reserved = math.ceil(self.most_replicas * self.replica_cpus)
        return self.ray_cpus or max(os.cpu_count() or 1, reserved)
