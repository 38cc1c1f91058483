"""The application on Ray Serve, for `serve run serving.ray_app:app` and Serve's config files.

Ingress (HTTP, the app of `serving.app`) -> Engine (one vLLM engine a replica); the Coordinator
keeps the adapter registry and everybody's metrics.
"""

# Without `from __future__ import annotations`: Serve makes `app`'s settings by its annotation.
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.schema import LoggingConfig

from serving.cluster.coordinator import Coordinator
from serving.cluster.ingress import Ingress
from serving.cluster.replica import EngineReplica
from serving.cluster.router import STATS_PERIOD_S, AdapterRouter
from serving.cluster.settings import ENGINE_CLASS, RayAppSettings
from serving.facts import engine_info

NAME = "sieve"
_MANY = 100_000
_ON_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
"""Where Ray's own state is: a worker node that is lost takes no HTTP side and no registry along."""
_FULL_BACKOFF_S = 0.05
"""How often full engines are asked again: at Ray's 0.5 s they ran empty while requests waited."""
_SURGE_PERCENT = 25
"""A new replica starts before an old one stops; Serve by itself stops one first."""


def app(args: RayAppSettings) -> Application:
    """The application of these settings."""
    return build(args)


def build(settings: RayAppSettings, engine_class: str = ENGINE_CLASS) -> Application:
    """The application, with engines of any class that starts as `VllmEngine` does."""
    coordinator = serve.deployment(
        Coordinator,
        name="Coordinator",
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options=_ON_HEAD,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=1,
        logging_config=_logging(settings),
    ).bind(settings)
    engines = serve.deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.max_pending,
        ray_actor_options={
            "num_cpus": settings.replica_cpus,
            "num_gpus": settings.replica_gpus,
        },
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=1,
        max_surge_percent=_SURGE_PERCENT,
        logging_config=_logging(settings),
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_routing_stats_period_s=STATS_PERIOD_S,
            max_backoff_s=_FULL_BACKOFF_S,
        ),
        **_size(settings),
    ).bind(settings, coordinator, engine_class)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=settings.max_pending + 1000,
        ray_actor_options=_ON_HEAD if settings.ingress_replicas == 1 else {"num_cpus": 0},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=1,
        max_surge_percent=_SURGE_PERCENT,
        logging_config=_logging(settings),
    )
    return ingress.bind(settings, engines, coordinator)


def _size(settings: RayAppSettings) -> dict[str, Any]:
    """A fixed number of engines, or as many as the load needs."""
    if settings.least_replicas == settings.most_replicas:
        return {"num_replicas": settings.least_replicas}
    tokens = settings.visual_tokens_per_replica
    if tokens is None:
        tokens = 0.5 * settings.ongoing * engine_info(settings).num_patches
    policy = AutoscalingPolicy(
        policy_function="serving.cluster.autoscaling:TokenPolicy",
        policy_kwargs={
            "visual_tokens_per_replica": tokens,
            "target_wait_s": settings.target_wait_s,
        },
    )
    config = AutoscalingConfig(
        min_replicas=settings.least_replicas,
        initial_replicas=max(1, settings.least_replicas),
        max_replicas=settings.most_replicas,
        metrics_interval_s=0.5,
        look_back_period_s=2.0,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        downscale_to_zero_delay_s=settings.zero_delay_s,
        policy=policy,
    )
    return {"autoscaling_config": config}


def _logging(settings: RayAppSettings) -> LoggingConfig:
    """Serve's own log; its line a call would drown ours."""
    level = {"warning": "WARNING", "info": "WARNING"}.get(
        settings.log_level, settings.log_level.upper()
    )
    encoding = "JSON" if settings.log_format == "json" else "TEXT"
    return LoggingConfig(encoding=encoding, log_level=level, enable_access_log=False)
