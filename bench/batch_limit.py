"""The batch pipeline beside the engine that it feeds: one process, one engine, blocks in turn.

Three arms. `batch` reads posts, decodes and fits their images in workers, labels, journals and
publishes, as `python -m serving batch` does. `labeler` gets decoded and fitted images: prompts,
image processor and scores are left. `engine` gets inputs that are rendered to token ids and pixels:
what is left is vLLM's client and its engine core, the limit of anything that feeds it.

No post comes twice, so no cache knows one. Blocks of an arm follow each other in the input.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.outcome import BenchError, progress
from bench.statistics import Sample, interleaved
from serving.app import image_limits
from serving.batch.answering import Answerer
from serving.batch.job import Plan
from serving.batch.live import LiveLabeler
from serving.batch.options import BatchOptions
from serving.batch.outcomes import Failure
from serving.batch.prepare import Prepared, Preparer
from serving.batch.shards import RunFolder
from serving.batch.work import CHUNK
from serving.fitting import Fitting
from serving.labeler import Labeler
from serving.posts import Post
from serving.prompts import encode, render_prompt
from serving.protocol import Generation
from serving.settings import Settings

ARMS = ("batch", "labeler", "engine")
BATCH, _, ENGINE = ARMS
Ready = list[tuple[Post, Prepared]]


async def measure(
    options: BatchOptions, settings: Settings, *, rounds: int, warmup: int, block: int, seed: int
) -> list[Sample]:
    """Seconds a block of each arm in each round.

    Args:
        options: of the batch; `out` is a folder to work in.
        settings: of the engine.
        rounds: that count.
        warmup: rounds before them.
        block: posts.
        seed: of the order of arms.

    Raises:
        BenchError: the data has too few posts that can be labelled.
    """
    plan = await Plan.make(options, settings)
    source = iter(plan.posts().entries())
    fitting = Fitting.of(settings.model)
    preparer = Preparer(image_limits(settings), fitting, num_workers=options.num_workers)
    samples = []
    try:
        async with LiveLabeler.running(plan.labeling) as live:
            arms = Arms(plan, preparer, live, block)
            for index, arm in interleaved(ARMS, warmup + rounds, seed):
                seconds = await arms.time(arm, source)
                progress(f"limit {index - warmup + 1}/{rounds} {arm:8} {block / seconds:7.1f}/s")
                if index >= warmup:
                    samples.append(Sample(round=index - warmup, variant=arm, seconds=seconds))
    finally:
        preparer.close()
    return samples


class Arms:
    """The arms on one engine.

    Args:
        plan: of the batch.
        preparer: decodes images, before the clock starts or after.
        live: holds the engine.
        block: posts a call.
    """

    def __init__(self, plan: Plan, preparer: Preparer, live: LiveLabeler, block: int) -> None:
        self._plan, self._preparer, self._live, self._block = plan, preparer, live, block
        self._numbers = itertools.count()

    async def time(self, arm: str, source: Iterator[Any]) -> float:
        """Seconds that an arm takes for the next block of the source."""
        if arm == BATCH:
            return await self._time_batch(source)
        ready = await self._prepared(source)
        labeler, choices = self._live.labeler, self._choices
        if arm == ENGINE:
            requests = [self._request(labeler, *item) for item in ready]
            async with rendered_ahead(labeler.engine, requests):
                return await self._timed([partial(labeler.engine.generate, r) for r in requests])
        return await self._timed(
            [partial(labeler.label, post.text, p.pictures(), choices) for post, p in ready]
        )

    @property
    def _choices(self) -> Any:
        ((choices, _),) = self._plan.asked.of(Post(id="", text="", images=()))
        return choices

    async def _time_batch(self, source: Iterator[Any]) -> float:
        options = self._plan.options
        out = options.out / f"block-{next(self._numbers)}"
        outcomes: list[Any] = []
        answerer = Answerer(self._plan.asked)
        started = time.perf_counter()
        await self._plan.work(RunFolder(out)).run(
            itertools.islice(source, self._block),
            self._preparer,
            lambda post, found: self._live.do(partial(answerer.answer, post=post, prepared=found)),
            concurrency=options.concurrency,
            on_done=outcomes.append,
        )
        seconds = time.perf_counter() - started
        failed = [outcome for outcome in outcomes if outcome.error or outcome.is_repeat]
        if failed or len(outcomes) < self._block:
            raise BenchError(_too_few(len(outcomes), self._block, failed))
        return seconds

    async def _prepared(self, source: Iterator[Any]) -> Ready:
        posts = list(itertools.islice(source, self._block))
        chunks = [posts[i : i + CHUNK] for i in range(0, len(posts), CHUNK)]
        found = [item for chunk in chunks for item in await self._preparer.prepare(chunk)]
        ready = [(p, f) for p, f in zip(posts, found, strict=True) if not isinstance(f, Failure)]
        if len(ready) < self._block:
            raise BenchError(_too_few(len(ready), self._block, []))
        return ready

    async def _timed(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> float:
        gate = asyncio.Semaphore(self._plan.options.concurrency)

        async def do(call: Callable[[], Awaitable[Any]]) -> None:
            async with gate:
                await call()

        started = time.perf_counter()
        await asyncio.gather(*map(do, calls))
        return time.perf_counter() - started

    def _request(self, labeler: Labeler, post: Post, prepared: Prepared) -> Generation:
        """What `Labeler.label` asks the engine for."""
        settings = labeler.catalogue.resolve(self._choices)
        constraint = labeler.constraint_of(settings.structure)
        images = prepared.pictures()
        prompt = render_prompt(labeler.tokenizer, constraint.structure, post.text, len(images))
        return Generation(
            request_id=f"limit-{uuid.uuid4().hex}",
            prompt_ids=encode(labeler.tokenizer, prompt),
            images=images,
            adapter=settings.adapter,
            retention=settings.retention,
            pattern=constraint.pattern,
            max_tokens=max(1, constraint.num_steps),
            num_logprobs=constraint.num_logprobs,
        )


@contextlib.asynccontextmanager
async def rendered_ahead(engine: Any, requests: Sequence[Generation]) -> AsyncIterator[None]:
    """The engine finds these requests rendered: prompt and image processor are done before."""
    from serving.engine import _prompt

    renderer = engine._llm.renderer
    render = renderer.render_cmpl_async
    ahead = {id(r.prompt_ids): await render([_prompt(r)]) for r in requests}

    async def find(prompts: Sequence[dict[str, Any]]) -> Any:
        return ahead.pop(id(prompts[0]["prompt_token_ids"]))

    renderer.render_cmpl_async = find
    try:
        yield
    finally:
        renderer.render_cmpl_async = render


def _too_few(found: int, wanted: int, failed: Sequence[Any]) -> str:
    why = f"; the first of {len(failed)}: {failed[0].id} {failed[0].error}" if failed else ""
    return (
        f"--data: a block has {found} of {wanted} posts that are new and can be labelled{why}; "
        "give more or other posts, or smaller --block and --rounds"
    )


def write_posts(folder: Path, count: int, seed: int, size: tuple[int, int]) -> Path:
    """A JSONL of posts with JPEG photos beside it, each another."""
    import json

    from bench.contest import make_text
    from bench.pictures import picture

    folder.mkdir()
    with (folder / "posts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            picture(seed, number, size).save(folder / f"{number}.jpg", quality=90)
            row = {"id": str(number), "image": f"{number}.jpg", "text": make_text(seed, number)}
            file.write(json.dumps(row) + "\n")
    return folder / "posts.jsonl"
