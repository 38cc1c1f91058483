"""Prometheus metrics of the HTTP side; vLLM adds its own to the same registry."""

from __future__ import annotations

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Args:
        registry: by default the process's, where vLLM's are.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.requests = Counter(
            "sieve_requests",
            "Requests by endpoint, model and HTTP status",
            ["endpoint", "model", "status"],
            registry=registry,
        )
        self.latency = Histogram(
            "sieve_request_seconds",
            "Time from the parsed request to its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.kept_tokens = Counter(
            "sieve_kept_visual_tokens", "Visual tokens the model read", registry=registry
        )
        self.saved_tokens = Counter(
            "sieve_saved_visual_tokens", "Visual tokens left out", registry=registry
        )
        self.labels = Counter(
            "sieve_labels",
            "Labels answered",
            ["model", "label_structure", "field", "label"],
            registry=registry,
        )
        self.tower_images = Gauge(
            "sieve_tower_images",
            "Images that went through the vision tower (a cached image does not)",
            registry=registry,
        )

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
