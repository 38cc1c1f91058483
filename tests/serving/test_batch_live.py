"""An engine that ends under a batch: all posts are labelled but the one that ends it."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from serving.batch.live import MOST_IN_A_ROW, LiveLabeler
from serving.batch.outcomes import Failure
from serving.errors import EngineDeadError


class MortalLabeler:
    """Ends on posts that are poison, and for everything that is in it at the time."""

    def __init__(self, engines):
        self.engines, self.ended, self.work_s = engines, asyncio.Event(), 0.01

    async def label(self, post):
        if post.startswith("poison"):
            await asyncio.sleep(0.005)
            self.ended.set()
        waiting = asyncio.ensure_future(self.ended.wait())
        done, _ = await asyncio.wait({waiting}, timeout=self.work_s)
        waiting.cancel()
        if done:
            raise EngineDeadError("the engine stopped")
        return f"labels of {post}"


def starts(engines):
    @asynccontextmanager
    async def start():
        labeler = MortalLabeler(engines)
        engines.append(labeler)
        try:
            yield labeler
        finally:
            labeler.ended.set()

    return start


async def label_all(posts, concurrency=8):
    """Outcomes by post, and the engines it took."""
    engines, gate = [], asyncio.Semaphore(concurrency)
    async with LiveLabeler.running(starts(engines)) as live:

        async def one(post):
            async with gate:
                try:
                    return await live.do(lambda labeler: labeler.label(post))
                except Failure as failure:
                    return failure

        done = await asyncio.gather(*map(one, posts))
    assert all(engine.ended.is_set() for engine in engines)  # none is left running
    return dict(zip(posts, done, strict=True)), engines


@pytest.mark.parametrize("concurrency", [1, 3, 16])
async def test_a_poison_post_costs_itself_and_two_starts(concurrency):
    posts = [*(f"post {i}" for i in range(20)), "poison", *(f"post {i}" for i in range(20, 40))]
    done, engines = await label_all(posts, concurrency)
    failure = done.pop("poison")
    assert (failure.stage, failure.code, failure.can_retry) == ("label", "engine_crashed", True)
    assert done == {post: f"labels of {post}" for post in posts if post != "poison"}
    assert len(engines) == 3


async def test_an_engine_killed_from_outside_costs_no_post():
    engines, posts = [], [f"post {i}" for i in range(30)]
    async with LiveLabeler.running(starts(engines)) as live:
        engines[0].work_s = 60
        labelling = asyncio.gather(
            *(live.do(lambda labeler, post=post: labeler.label(post)) for post in posts)
        )
        await asyncio.sleep(0.005)
        engines[0].ended.set()
        assert await labelling == [f"labels of {post}" for post in posts]
    assert len(engines) == 2


async def test_many_poisons_with_labels_in_between_do_not_end_the_run():
    posts = [name for i in range(2 * MOST_IN_A_ROW) for name in (f"post {i}", f"poison {i}")]
    done, _ = await label_all(posts, concurrency=1)
    assert sum(isinstance(found, Failure) for found in done.values()) == 2 * MOST_IN_A_ROW
    assert sum(isinstance(found, str) for found in done.values()) == 2 * MOST_IN_A_ROW


async def test_an_engine_that_ends_on_everything_ends_the_run():
    with pytest.raises(EngineDeadError, match=f"ended on {MOST_IN_A_ROW} posts in a row"):
        await label_all([f"poison {i}" for i in range(9)], concurrency=4)


async def test_an_engine_that_cannot_start_again_ends_the_run():
    engines, is_first = [], True

    @asynccontextmanager
    async def start():
        nonlocal is_first
        if not is_first:
            raise EngineDeadError("no memory")
        is_first = False
        async with starts(engines)() as labeler:
            yield labeler

    with pytest.raises(EngineDeadError, match="no memory"):
        async with LiveLabeler.running(start) as live:
            await live.do(lambda labeler: labeler.label("poison"))
