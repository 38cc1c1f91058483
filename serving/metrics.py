"""Prometheus metrics of the HTTP side and of an engine; vLLM adds its own to the same registry."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from serving.adapter_states import AdapterStatus, State
from serving.schema import LabelResponse

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
        self.rejections = Counter(
            "sieve_rejections",
            "Requests that were refused or given up, by reason",
            ["reason"],
            registry=registry,
        )
        self.retries = Counter(
            "sieve_retries",
            "Requests sent to another engine after theirs was lost, by reason",
            ["reason"],
            registry=registry,
        )
        self.image_workers_lost = Counter(
            "sieve_image_workers_lost",
            "Image workers replaced, by reason: an image took too long, crashed one, or one was "
            "killed from outside",
            ["reason"],
            registry=registry,
        )
        self.pending = Gauge(
            "sieve_pending_requests", "Requests taken and not yet answered", registry=registry
        )
        self.pending_bytes = Gauge(
            "sieve_pending_bytes", "Bytes of bodies not yet answered", registry=registry
        )
        self.adapters = Gauge(
            "sieve_adapters", "Adapter versions by state", ["state"], registry=registry
        )
        self.adapter_state = Gauge(
            "sieve_adapter_state",
            "1 for the state that an adapter version is in",
            ["model", "version", "state"],
            registry=registry,
        )
        self.tower_images = Gauge(
            "sieve_tower_images",
            "Images that went through the vision tower (a cached image does not)",
            registry=registry,
        )

    def reject(self, reason: str) -> None:
        """Counts a request that was not answered."""
        self.rejections.labels(reason).inc()

    def labelled(self, answer: LabelResponse) -> None:
        """Counts an answered post."""
        self.requests.labels("label", answer.model, "200").inc()
        self.kept_tokens.inc(answer.retention.kept)
        self.saved_tokens.inc(answer.retention.patches - answer.retention.kept)
        for field, label in answer.labels.items():
            self.labels.labels(answer.model, answer.label_structure, field, label).inc()

    def chatted(self, model: str, kept: int, saved: int) -> None:
        """Counts an answered chat and its visual tokens."""
        self.requests.labels("chat", model, "200").inc()
        self.kept_tokens.inc(kept)
        self.saved_tokens.inc(saved)

    def set_adapters(self, statuses: Iterable[AdapterStatus]) -> None:
        """Shows the state of every adapter version."""
        self.adapter_state.clear()
        counts = dict.fromkeys(State, 0)
        for status in statuses:
            counts[status.state] += 1
            self.adapter_state.labels(status.name, status.version, status.state).set(1)
        for state, count in counts.items():
            self.adapters.labels(state).set(count)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class EngineMetrics:
    """Counters of one engine.

    Args:
        registry: by default the process's, where vLLM's are.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.queue_wait = Histogram(
            "sieve_queue_wait_seconds",
            "Wait of a labelled post from the HTTP side to its first step in the engine",
            buckets=_SECONDS,
            registry=registry,
        )
        self.adapter_loads = Histogram(
            "sieve_adapter_load_seconds",
            "Time that loading an adapter held the engine up",
            buckets=_SECONDS,
            registry=registry,
        )
        self.restarts = Counter(
            "sieve_engine_restarts",
            "Engines that were lost and started again, by reason",
            ["reason"],
            registry=registry,
        )
        self.up = Gauge("sieve_engine_up", "1 while the engine answers", registry=registry)
        for reason in ("died", "hung"):
            self.restarts.labels(reason)

    def lost(self, reason: str) -> None:
        """Counts a lost engine."""
        self.up.set(0)
        self.restarts.labels(reason).inc()

    def adapter_loaded(self, seconds: float) -> None:
        """Counts a load."""
        self.adapter_loads.observe(seconds)


class ClusterMetrics:
    """What Ray's autoscaler sees and does.

    Args:
        registry: one of its own for each scrape.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.replicas = Gauge(
            "sieve_replicas", "Engine replicas, running and wanted", ["state"], registry=registry
        )
        self.decisions = Counter(
            "sieve_autoscaling_decisions",
            "Changes of the number of replicas, done or held back, by reason",
            ["reason"],
            registry=registry,
        )
        self.restarts = Counter(
            "sieve_engine_restarts",
            "Engines that were lost and started again, by reason",
            ["reason"],
            registry=registry,
        )
        self.visual_tokens = Gauge(
            "sieve_autoscaling_visual_tokens",
            "Kept visual tokens in flight, as the autoscaler saw them last",
            registry=registry,
        )
        self.queue_wait = Gauge(
            "sieve_autoscaling_queue_wait_seconds",
            "Longest recent wait for an engine, as the autoscaler saw it last",
            registry=registry,
        )
