"""A batch on Ray Data: shards are handed to engines in actors, on this machine or on a cluster.

What makes a run safe to kill is the run's folder, not Ray: an engine publishes a shard whole or not
at all and journals what it has of the others, so Ray may give a shard of a lost actor to another
one, and a later run goes on wherever this one ended. The driver holds the folder's lock; a run
after it also waits until the engines of a killed driver have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

from serving.batch.job import Plan
from serving.batch.options import BatchOptions
from serving.batch.report import Progress
from serving.batch.shard_worker import AT_ONCE, ShardWorker
from serving.batch.shards import Journal, RunFolder
from serving.errors import ConfigError, EngineDeadError, SieveError

try:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, Dataset
    from ray.exceptions import RayActorError, RayError
except ModuleNotFoundError as error:
    raise ConfigError("--ray needs Ray: pip install 'llava-sieve[ray]'", param="ray") from error

MAX_LOST = 3
"""A shard that lost so many actors ends the run."""
_STORE_BYTES = 200_000_000
_ACTORS_S = 300


async def run_on_ray(plan: Plan, folder: RunFolder, num_posts: int) -> tuple[int, float, float]:
    """Labels what is left, on `options.engines` engines.

    Args:
        plan: of the batch.
        folder: of the run, held by this process.
        num_posts: of the source.

    Returns:
        Posts labelled, seconds for that, seconds until the first engine was there.

    Raises:
        SieveError: Ray or an engine cannot start, or the run cannot go on.
    """
    began = time.monotonic()
    left = shards_left(plan, folder, num_posts)
    done_before = num_posts - sum(left.values())
    with _on_ray(plan.options) as is_ours, Progress.shown(num_posts, done_before) as progress:
        starts_s = []
        ray_s = time.monotonic() - began
        async for done in _results(_dataset(plan, sorted(left), is_ours)):
            _check(done)
            starts_s.append(done["start_s"])
            counts = {name: done.get(name, 0) for name in ("failed", "kept", "patches")}
            progress.add_posts(left[done["shard"]], **counts)
        wall_s = time.monotonic() - began
        start_s = ray_s + min(starts_s)
        # Ray ends an actor's resource tracker before the actor, which says so at length.
        with contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(ConfigError):  # what does not end now, Ray ends
                await asyncio.to_thread(folder.wait_for_helpers)
            ray.shutdown()
    folder.recover()
    return progress.num_done, wall_s - start_s, start_s


def shards_left(plan: Plan, folder: RunFolder, num_posts: int) -> dict[int, int]:
    """Shards that are not done, with their posts that have no outcome yet."""
    options, commits = plan.options, folder.commits()
    left = {}
    for index in range(-(-num_posts // options.shard_size)):
        commit = commits.get(index)
        if commit is not None and not (options.retry_failed and commit["failed"]):
            continue
        size = min(options.shard_size, num_posts - index * options.shard_size)
        left[index] = size - _num_journalled(folder, index, options)
    return left


def _num_journalled(folder: RunFolder, index: int, options: BatchOptions) -> int:
    if not folder.journal(index).exists():
        return 0
    journal = Journal(folder.journal(index), keeps_errors=not options.retry_failed)
    journal.close()
    return len(journal.outcomes)


def _dataset(plan: Plan, shards: list[int], is_ours: bool) -> Dataset:
    """Numbers of shards, a block each, mapped by actors with an engine each."""
    options = plan.options
    engines = min(options.engines, len(shards))
    _configure(DataContext.get_current(), is_ours)
    cores = os.cpu_count() or 1
    if is_ours:  # engines on one machine share its cores
        options = replace(options, workers=max(1, options.num_workers // engines))
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    return ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        ShardWorker,
        fn_constructor_args=(options, plan.settings, os.getcwd()),
        batch_size=1,
        compute=ActorPoolStrategy(
            size=engines,
            max_tasks_in_flight_per_actor=AT_ONCE,
            max_concurrent_calls_per_actor=AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=max(1, cores // engines) if is_ours else 1,
        num_gpus=1 if has_gpu else 0,
        ray_remote_args_fn=lambda: {
            "max_restarts": MAX_LOST * engines,
            "max_task_retries": MAX_LOST,
        },
    )


def _configure(context: DataContext, is_ours: bool) -> None:
    context.enable_progress_bars = False  # ours counts posts
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may take hours
    context.issue_detectors_config.detectors = []  # nor does that hang
    if is_ours:  # else the first actor there would take two shards of two
        context.wait_for_min_actors_s = _ACTORS_S


async def _results(dataset: Dataset) -> AsyncIterator[dict[str, Any]]:
    """What became of each shard, as they end.

    Raises:
        EngineDeadError: Ray gave a shard up.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()

    def put(item: dict[str, Any] | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended before this thread
            loop.call_soon_threadsafe(found.put_nowait, item)

    def read() -> None:
        try:
            for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
                put(json.loads(batch["done"][0]))
            put(None)
        except BaseException as error:
            put(error)

    # A daemon, for a run that is stopped must not wait for it.
    threading.Thread(target=read, daemon=True).start()
    while (item := await found.get()) is not None:
        if isinstance(item, RayError):
            raise EngineDeadError(
                f"Ray gave up ({type(item).__name__}): {_reason(item)}; what is labelled "
                "stays, run the same command again to go on"
            ) from item
        if isinstance(item, BaseException):
            raise item
        yield item


def _reason(error: RayError) -> str:
    """A lost actor's first line, an exception's last one: between them are tracebacks."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0 if isinstance(error, RayActorError) else -1]


def _check(done: dict[str, Any]) -> None:
    """Raises the error that a shard came back with."""
    if "error" not in done:
        return
    if done["status"] == EngineDeadError.status:
        raise EngineDeadError(done["error"])
    raise SieveError(done["error"], param=done["param"])


@contextlib.contextmanager
def _on_ray(options: BatchOptions) -> Iterator[bool]:
    """A Ray of our own, or that of a cluster; says which. What was started here ends here.

    Raises:
        ConfigError: there is no such cluster.
    """
    # Engines on one machine must not bind to the same cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_ours = options.ray_address is None
    folder = tempfile.mkdtemp(prefix="sieve-ray-") if is_ours else None
    try:
        _join(options, folder)
        print(
            "Ray started here" if is_ours else f"joined Ray at {options.ray_address}",
            file=sys.stderr,
        )
        yield is_ours
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _join(options: BatchOptions, folder: str | None) -> None:
    stop = signal.getsignal(signal.SIGTERM)
    is_ours = folder is not None
    try:
        ray.init(
            address="local" if is_ours else options.ray_address,
            num_cpus=max(os.cpu_count() or 1, options.engines) if is_ours else None,
            object_store_memory=_STORE_BYTES if is_ours else None,
            include_dashboard=False if is_ours else None,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _environment()},
            _temp_dir=folder,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray-address {options.ray_address}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, stop)  # Ray sets one that exits at once
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _environment() -> dict[str, str]:
    """What engines on other nodes need of this process's environment."""
    prefixes = ("SIEVE_", "VLLM_", "OMP_", "HF_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
