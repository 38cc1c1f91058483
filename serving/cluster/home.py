"""`python -m serving --ray`: the application on this machine's own Ray, or on a cluster's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation

from serving.client_key import VARIABLE as CLIENTS_KEY
from serving.cluster.settings import RayAppSettings
from serving.errors import ConfigError
from serving.keys import describe_access
from serving.ray_app import NAME, app
from serving.server import Report, check_model

logger = logging.getLogger("sieve")


async def serve_on_ray(settings: RayAppSettings) -> None:
    """Runs until SIGINT or SIGTERM; then the application ends, and Ray if it was started here.

    Raises:
        ConfigError: there is no such cluster, or the application does not start.
    """
    report: Report = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    check_model(settings.model)
    # A cluster's own nodes may have the file where this machine has none.
    keys = settings.keys if settings.ray_address is None else None
    if settings.keys == keys and (access := describe_access(keys, settings.host)):
        report(access)
    stop = asyncio.Event()
    with _on_ray(settings, report, stop):
        for number in (signal.SIGINT, signal.SIGTERM):  # after `ray.init`, which sets its own
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        started = time.perf_counter()
        is_serving = False
        report(f"starting {settings.replicas} engine(s) on Ray (a minute on a small machine) ...")
        running = asyncio.create_task(asyncio.to_thread(_deploy, settings))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                report(f"ready in {time.perf_counter() - started:.0f} s")
                report(f"serving {settings.served_name} on http://{settings.host}:{settings.port}")
                is_serving = True
                await stopped
            report("stopping")
            stop.clear()
            if is_serving:
                await _drain(settings, stop)
        finally:
            await _delete(stop)


async def _drain(settings: RayAppSettings, hurry: asyncio.Event) -> None:
    """Waits until what was accepted is answered and the rest is told; not after a second signal.

    Serve by itself stops all deployments at once: a request that waits for an engine would find
    none any more.
    """
    coordinator = serve.get_deployment_handle("Coordinator", NAME)
    draining = asyncio.ensure_future(_asked(coordinator.drain.remote(settings.drain_s)))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not draining.done():
        draining.cancel()
        return
    try:
        if not draining.result():
            logger.warning("not every HTTP side has told that it answered all it had accepted")
    except RayError as error:
        logger.warning("the coordinator is gone, accepted requests may be lost: %r", error)


async def _delete(hurry: asyncio.Event) -> None:
    """Deletes the application, and waits until it is gone; not after a second signal."""
    await asyncio.to_thread(serve.delete, NAME, _blocking=False)
    while not hurry.is_set():
        status = await asyncio.to_thread(serve.status)
        if NAME not in status.applications:
            return
        await asyncio.sleep(0.2)


async def _asked(response: Any) -> bool:
    return bool(await response)


def _deploy(settings: RayAppSettings) -> None:
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(
                host=settings.host,
                port=settings.port,
                request_timeout_s=None,
                keep_alive_timeout_s=60,
            ),
        )
        serve.run(app(settings), name=NAME)
    except RuntimeError as error:
        raise ConfigError(f"the application did not start: {error}") from error


@contextlib.contextmanager
def _on_ray(settings: RayAppSettings, report: Report, hurry: asyncio.Event) -> Iterator[None]:
    """A Ray of our own, or that of a cluster; what was started here ends here."""
    # Engines on one machine must not bind to the same cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    is_ours = settings.ray_address is None
    try:
        ray.init(
            address="local" if is_ours else settings.ray_address,
            num_cpus=settings.own_ray_cpus if is_ours else None,
            include_dashboard=False if is_ours else None,
            log_to_driver=True,
            logging_level=logging.ERROR,
            namespace=NAME,
            runtime_env={"env_vars": _environment()},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray-address {settings.ray_address}: {error}") from error
    report("Ray started here" if is_ours else f"joined Ray at {settings.ray_address}")
    try:
        yield
    finally:
        if is_ours and not hurry.is_set():
            serve.shutdown()
        ray.shutdown()


def _environment() -> dict[str, str]:
    """What engines on other nodes need of this process's environment."""
    prefixes = ("SIEVE_", "VLLM_", "OMP_", "HF_")
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(prefixes) and name != CLIENTS_KEY
    }
