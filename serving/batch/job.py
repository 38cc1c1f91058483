"""A batch from its options: what is asked, the engine in this process, the summary."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving.adapters import read_base
from serving.app import image_limits
from serving.batch.answering import Answerer, Asked
from serving.batch.live import LiveLabeler
from serving.batch.options import BatchOptions
from serving.batch.prepare import Preparer
from serving.batch.report import BatchSummary, Progress
from serving.batch.shards import RunFolder, write_whole, writing
from serving.batch.tables import Table
from serving.batch.work import Work
from serving.catalogue import Catalogue, Choices
from serving.errors import ConfigError
from serving.fitting import Fitting
from serving.labeler import Labeler
from serving.posts import Posts, read_posts
from serving.registry import Registry
from serving.server import (
    catalogue_of,
    check_model,
    open_registry,
    running_labeler,
)
from serving.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A batch that can be run: checked, with its names resolved.

    Attributes:
        options: of the batch.
        settings: of its engine.
        catalogue: models and structures there are.
        registry: of the adapters.
        table: what rows look like.
    """

    options: BatchOptions
    settings: Settings
    catalogue: Catalogue
    registry: Registry
    table: Table

    @classmethod
    async def make(cls, options: BatchOptions, settings: Settings) -> Plan:
        """Checks everything that can be checked before an engine is started.

        Raises:
            SieveError: a model, structure, selector or ratio does not exist, or no such checkpoint.
        """
        check_model(settings.model)
        catalogue = catalogue_of(settings)
        registry = await open_registry(settings, catalogue)
        catalogue.update(registry.snapshot().served)
        fields = {}
        for model in options.models or (None,):
            choices = Choices(**{**vars(options.choices), "model": model})
            resolved = catalogue.resolve(choices)
            fields[resolved.model] = dict(resolved.structure.fields)
        versions = {
            "llava_sieve": version("llava-sieve"),
            "base": (read_base(settings.model).fingerprint or settings.model)[:12],
        }
        table = Table(fields=fields, versions=versions, abstain=options.abstain)
        return cls(
            options=options,
            settings=settings,
            catalogue=catalogue,
            registry=registry,
            table=table,
        )

    def identity(self) -> dict[str, Any]:
        """What must stay the same over the processes of one run."""
        adapters = {
            name: self.catalogue.adapters[name].adapter.digest[:12]
            for name in self.table.fields
            if name in self.catalogue.adapters
        }
        engine = {"dtype": self.settings.dtype, "default_retention": self.settings.retention}
        return {
            **self.options.identity(),
            **engine,
            "versions": dict(self.table.versions),
            "adapters": adapters,
        }

    @property
    def asked(self) -> Asked:
        """What is asked of every post."""
        options = self.options
        return Asked(
            models=options.models,
            choices=options.choices,
            cascade=options.steps,
            max_text_chars=self.settings.max_text_chars,
            is_fixed=options.format != "jsonl",
        )

    def posts(self) -> Posts:
        """The posts to label."""
        options = self.options
        return read_posts(
            options.data if options.is_remote else Path(options.data),
            split=options.split,
            fields=options.fields or None,
            duplicates=options.duplicates,
        )

    def work(self, folder: RunFolder, shards: frozenset[int] | None = None) -> Work:
        """The work that is left in a run's folder."""
        return Work(
            folder,
            self.table,
            format=self.options.format,
            shard_size=self.options.shard_size,
            retries_failed=self.options.retry_failed,
            shards=shards,
        )

    @asynccontextmanager
    async def labeling(self) -> AsyncIterator[Labeler]:
        """A labeler on an engine of its own."""
        async with running_labeler(
            self.settings, _report, self.catalogue, self.registry
        ) as labeler:
            yield labeler


async def run_batch(options: BatchOptions, settings: Settings) -> int:
    """Labels posts into a folder, or goes on where a run before it ended.

    Returns:
        0 when every post has labels, 3 where some failed.

    Raises:
        SieveError: the run cannot start or go on; what is published stays.
    """
    plan = await Plan.make(options, settings)
    posts = plan.posts()
    folder = RunFolder(options.out)
    with folder.held():
        goes_on = folder.check_same(plan.identity())
        num_posts = await asyncio.to_thread(count_posts, posts, folder)
        work = plan.work(folder)
        is_left = needs_work(work, num_posts)
        if goes_on:
            _report(f"going on: {work.num_done} of {num_posts} posts have their rows")
        num_now, wall_s, start_s = 0, 0.0, 0.0
        if is_left and options.engines:
            from serving.batch.scale import run_on_ray

            num_now, wall_s, start_s = await run_on_ray(plan, folder, num_posts)
        elif is_left:
            num_now, wall_s, start_s = await _run_here(plan, work, posts, num_posts)
        summary = BatchSummary(
            counts=folder.counts(),
            num_now=num_now,
            wall_s=wall_s,
            start_s=start_s,
            num_left_out=posts.num_left_out + _num_dropped(posts, options),
            cascade=options.cascade,
            abstain=options.abstain,
        )
        with writing(options.out):
            write_whole(options.out / "summary.json", summary.to_json())
    print(summary)
    if summary.counts["posts"] != num_posts:
        raise ConfigError(
            f"{summary.counts['posts']} rows for {num_posts} posts: the data changed while it was "
            "read; name another --out",
            param="data",
        )
    return 3 if summary.counts["failed"] else 0


def needs_work(work: Work, num_posts: int) -> bool:
    """Whether some post has no row yet, or failed and is to be tried again."""
    return work.num_done < num_posts or (work.retries_failed and work.num_failed > 0)


def count_posts(posts: Posts, folder: RunFolder) -> int:
    """How many posts there are; a run's first process reads all ids to know.

    So an id that is there twice is told before an engine starts.

    Raises:
        ConfigError: an id is there twice where that is an error, or the source cannot be read.
    """
    path = folder.state / "posts.json"
    if path.exists():
        known: Mapping[str, int] = json.loads(path.read_text())
        posts.num_duplicates = known["duplicates"]
        return known["posts"]
    number = sum(1 for _ in posts.entries())
    with writing(folder.path):
        write_whole(path, json.dumps({"posts": number, "duplicates": posts.num_duplicates}))
    return number


def _num_dropped(posts: Posts, options: BatchOptions) -> int:
    return posts.num_duplicates if options.duplicates == "first" else 0


async def _run_here(
    plan: Plan, work: Work, posts: Posts, num_posts: int
) -> tuple[int, float, float]:
    """Posts labelled, seconds for that, seconds until the engine was there."""
    began = time.monotonic()
    settings, options = plan.settings, plan.options
    fitting = Fitting.of(settings.model)
    preparer = Preparer(image_limits(settings), fitting, num_workers=options.num_workers)
    answerer = Answerer(plan.asked)
    preparer.start()
    try:
        async with LiveLabeler.running(plan.labeling) as live:
            start_s = time.monotonic() - began
            with Progress.shown(num_posts, work.num_done) as progress:
                await work.run(
                    posts.entries(),
                    preparer,
                    lambda post, found: live.do(
                        partial(answerer.answer, post=post, prepared=found)
                    ),
                    concurrency=options.concurrency,
                    on_done=progress.add,
                )
                return progress.num_done, time.monotonic() - progress.started, start_s
    finally:
        preparer.close()


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
