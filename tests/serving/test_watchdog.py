"""An engine that dies or hangs: noticed, replaced, and what its clients are told meanwhile."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from patches.config import Retention
from serving import watchdog
from serving.errors import (
    BadRequestError,
    EngineDeadError,
    EngineLostError,
    EngineRestartingError,
)
from serving.metrics import EngineMetrics
from serving.process_family import ProcessFamily, descendants, seen
from serving.protocol import ChatCall, Generation
from serving.watchdog import Limits, WatchedEngine, until_lost
from tests.serving.fake_engine import FakeEngine

LIMITS = Limits(hang_timeout_s=0.4, max_restarts=5)
ASK = Generation(
    request_id="r",
    prompt_ids=[1],
    images=[],
    adapter=None,
    retention=Retention(),
    pattern="x",
    max_tokens=1,
    num_logprobs=1,
)
POISON = replace(ASK, prompt_ids=[666])


class MortalFake(FakeEngine):
    """Can die, hang, and be crashed by a poison; requests in it end as vLLM's do."""

    def __init__(self):
        super().__init__()
        self.is_silent = self.is_closed = False
        self.ended = asyncio.Event()
        self.killed = None
        self.inside = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_crash = False

    def die(self, *, is_crash=False):
        self.is_crash, self.is_dead = is_crash, True
        self.ended.set()

    async def generate(self, request):
        self.inside += 1
        try:
            if request.prompt_ids == POISON.prompt_ids:
                self.die(is_crash=True)
            await self._or_dead(self.gate.wait())
            return request.request_id
        finally:
            self.inside -= 1

    async def chat(self, call):
        async def events():
            yield "data: 1\n\n"
            await self._or_dead(self.gate.wait())
            yield "data: [DONE]\n\n"

        return events()

    async def _or_dead(self, work):
        tasks = {asyncio.ensure_future(work), asyncio.ensure_future(self.ended.wait())}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if self.ended.is_set():
            error = EngineDeadError("the engine stopped")
            error.is_crash, error.num_together = self.is_crash, self.inside
            error.engine = str(id(self))
            raise error

    async def ping(self):
        if self.is_silent:
            await self._or_dead(asyncio.Event().wait())

    async def kill(self, *, is_hung=False):
        self.killed = "hung" if is_hung else "dead"
        self.die(is_crash=self.is_crash or is_hung)

    async def close(self):
        assert self.killed or not self.is_dead
        self.is_closed = True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_S", 0.05)
    monkeypatch.setattr(watchdog, "PING_S", 0.02)
    monkeypatch.setattr(watchdog, "_SLICE_S", 0.05)
    monkeypatch.setattr(watchdog, "_MOST_BACKOFF_S", 0.02)


class Starts:
    """Starts engines one after the other; each waits for leave, or fails."""

    def __init__(self, *, seconds=0.0, failures=()):
        self.engines, self.again = [], []
        self.seconds, self.failures = seconds, list(failures)
        self.followed = []

    async def __call__(self, is_again):
        self.again.append(is_again)
        await asyncio.sleep(self.seconds)
        if is_again and self.failures:
            raise self.failures.pop()
        self.engines.append(MortalFake())
        return self.engines[-1]

    async def follow(self, engine):
        self.followed.append(engine)
        try:
            await asyncio.Event().wait()
        finally:
            self.followed.remove(engine)


async def until(is_true):
    async with asyncio.timeout(30):
        while not is_true():
            await asyncio.sleep(0.005)


async def up_again(watched, starts, number=2):
    await until(lambda: len(starts.engines) == number and watched._life is not None)
    await watched.check_health()


@pytest.fixture
async def kept():
    """Gives out watched engines and closes them."""
    opened = []

    async def start(starts, limits=LIMITS, metrics=None):
        opened.append(await WatchedEngine.started(starts, limits, metrics, starts.follow))
        return opened[-1]

    yield start
    for watched in opened:
        await watched.close()


async def test_a_dead_engine_is_replaced_with_its_adapters_and_answers_again(kept):
    starts, metrics = Starts(), EngineMetrics(registry := CollectorRegistry())
    watched = await kept(starts, metrics=metrics)
    assert registry.get_sample_value("sieve_engine_up") == 1
    assert await watched.generate(ASK) == "r"
    starts.engines[0].die()
    await up_again(watched, starts)
    assert await watched.generate(ASK) == "r"
    watched.check_up()
    assert starts.again == [False, True]
    assert starts.engines[0].is_closed
    await until(lambda: starts.followed == [starts.engines[1]])
    assert registry.get_sample_value("sieve_engine_restarts_total", {"reason": "died"}) == 1
    assert registry.get_sample_value("sieve_engine_restarts_total", {"reason": "hung"}) == 0
    assert registry.get_sample_value("sieve_engine_up") == 1


async def test_an_engine_that_answers_no_ping_is_killed_and_replaced(kept):
    starts, metrics = Starts(), EngineMetrics(registry := CollectorRegistry())
    watched = await kept(starts, metrics=metrics)
    starts.engines[0].is_silent = True
    await up_again(watched, starts)
    assert starts.engines[0].killed == "hung"
    assert starts.engines[0].is_closed
    assert registry.get_sample_value("sieve_engine_restarts_total", {"reason": "hung"}) == 1


async def test_what_was_inside_and_what_comes_meanwhile_may_come_again_when_it_is_up(kept):
    starts = Starts(seconds=0.5)
    watched = await kept(starts)
    starts.engines[0].gate.clear()
    inside = [asyncio.create_task(watched.generate(ASK)) for _ in range(3)]
    await until(lambda: starts.engines[0].inside == 3)
    watched._start_s = 41.2
    starts.engines[0].die()
    for outcome in await asyncio.gather(*inside, return_exceptions=True):
        assert isinstance(outcome, EngineRestartingError)
        assert 40 <= outcome.retry_after_s <= 42
        assert (outcome.status, outcome.code) == (503, "engine_restarting")
    with pytest.raises(EngineRestartingError):
        watched.check_up()
    for ask in (watched.generate(ASK), watched.check_health(), watched.tower_images()):
        with pytest.raises(EngineRestartingError):
            await ask
    await up_again(watched, starts)


async def test_a_step_shorter_than_the_limit_is_no_hang(kept):
    starts = Starts()
    watched = await kept(starts, Limits(hang_timeout_s=30, max_restarts=5))
    starts.engines[0].is_silent = True
    await asyncio.sleep(0.5)
    assert len(starts.engines) == 1
    await watched.check_health()


async def test_time_in_which_this_process_did_not_run_accuses_nobody():
    engine = MortalFake()
    engine.is_silent = True
    watching = asyncio.create_task(until_lost(engine, 1.0))
    await asyncio.sleep(0.05)
    time.sleep(1.5)  # as a stopped process: the clock goes on, the loop does not
    await asyncio.sleep(0.1)
    assert not watching.done()
    assert await watching == "hung"


async def test_a_stream_whose_engine_is_lost_ends_with_an_error_event(kept):
    starts = Starts()
    watched = await kept(starts)
    starts.engines[0].gate.clear()
    call = ChatCall(request_id="c", body={"stream": True}, retention=Retention())
    stream = await watched.chat(call)
    assert await anext(stream) == "data: 1\n\n"
    starts.engines[0].die()
    error, done = [event async for event in stream]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_restarting"
    assert done == "data: [DONE]\n\n"


async def test_a_poison_costs_two_engines_and_is_then_refused_for_good(kept):
    starts = Starts()
    watched = await kept(starts)
    with pytest.raises(EngineRestartingError):
        await watched.generate(POISON)
    await up_again(watched, starts, 2)
    with pytest.raises(BadRequestError, match="not tried again") as refused:
        await watched.generate(POISON)
    assert refused.value.code == "quarantined"
    await up_again(watched, starts, 3)
    with pytest.raises(BadRequestError):
        await watched.generate(replace(POISON, request_id="another"))
    assert await watched.generate(ASK) == "r"
    assert len(starts.engines) == 3


async def test_company_of_a_poison_is_answered_when_it_comes_again(kept):
    starts = Starts()
    watched = await kept(starts)
    starts.engines[0].gate.clear()
    company = asyncio.create_task(watched.generate(ASK))
    await until(lambda: starts.engines[0].inside == 1)
    for outcome in await asyncio.gather(watched.generate(POISON), company, return_exceptions=True):
        assert isinstance(outcome, EngineRestartingError)
    await up_again(watched, starts)
    assert await watched.generate(ASK) == "r"
    with pytest.raises(BadRequestError):
        await watched.generate(POISON)


async def test_the_same_question_many_times_in_one_failed_engine_is_suspected_once(kept):
    starts = Starts()
    watched = await kept(starts)
    starts.engines[0].gate.clear()
    asking = [asyncio.create_task(watched.generate(ASK)) for _ in range(5)]
    await until(lambda: starts.engines[0].inside == 5)
    starts.engines[0].die(is_crash=True)
    for outcome in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(outcome, EngineRestartingError)
    await up_again(watched, starts)
    assert await asyncio.gather(*(watched.generate(ASK) for _ in range(5))) == ["r"] * 5


async def test_an_engine_killed_from_outside_makes_no_request_suspect(kept):
    starts = Starts()
    watched = await kept(starts)
    for number in (1, 2, 3):
        starts.engines[-1].gate.clear()
        asking = asyncio.create_task(watched.generate(ASK))
        await until(lambda: starts.engines[-1].inside == 1)
        starts.engines[-1].die()
        with pytest.raises(EngineRestartingError):
            await asking
        await up_again(watched, starts, number + 1)
    assert await watched.generate(ASK) == "r"


async def test_restarts_in_a_row_are_bounded_and_the_reason_is_said(kept):
    starts = Starts(failures=[RuntimeError("no memory")] * 9)
    watched = await kept(starts, Limits(hang_timeout_s=1, max_restarts=3))
    starts.engines[0].die()
    with pytest.raises(EngineLostError, match="max-restarts"):
        await asyncio.wait_for(asyncio.shield(watched.watching), 30)
    assert starts.again == [False, True, True, True]
    with pytest.raises(EngineRestartingError):
        await watched.generate(ASK)


async def test_an_engine_that_lived_long_enough_starts_the_count_anew(kept, monkeypatch):
    monkeypatch.setattr(watchdog, "STABLE_S", 0.0)
    starts = Starts()
    watched = await kept(starts, Limits(hang_timeout_s=1, max_restarts=1))
    for number in range(2, 6):
        starts.engines[-1].die()
        await up_again(watched, starts, number)
    assert not watched.watching.done()


async def test_a_start_that_fails_once_is_tried_again(kept):
    starts = Starts(failures=[RuntimeError("busy")])
    watched = await kept(starts)
    starts.engines[0].die()
    await up_again(watched, starts)
    assert starts.again == [False, True, True]


async def test_a_request_that_engines_refuse_by_itself_is_no_sign_of_their_end(kept):
    starts = Starts()
    watched = await kept(starts)

    async def refuse(request):
        raise BadRequestError("too long")

    starts.engines[0].generate = refuse
    with pytest.raises(BadRequestError, match="too long"):
        await watched.generate(ASK)
    assert len(starts.engines) == 1


class Core:
    """A core as multiprocessing shows it, with a child that is stopped and one that is not."""

    def __init__(self):
        script = (
            "import subprocess, sys, time, signal\n"
            "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
            "a, b = subprocess.Popen(sleep), subprocess.Popen(sleep)\n"
            "a.send_signal(signal.SIGSTOP)\n"
            "print(a.pid, b.pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        self.popen = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        self.pid = self.popen.pid
        self.children = list(map(int, self.popen.stdout.readline().split()))

    @property
    def exitcode(self):
        return self.popen.poll()

    def join(self, timeout):
        try:
            self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return


@pytest.mark.parametrize("is_core_gone", [False, True])
def test_no_process_of_a_family_outlives_its_end_not_even_a_stopped_one(is_core_gone):
    core = Core()
    assert sorted(descendants(core.pid)) == sorted(core.children)
    family = ProcessFamily([core])
    assert family.pids == sorted([core.pid, *core.children])
    if is_core_gone:
        core.popen.kill()
        assert family.was_ended_from_outside(wait_s=30)
    family.kill()
    assert family.pids == []
    assert all(seen(pid) is None for pid in core.children)
    core.popen.stdout.close()


def test_another_process_of_the_same_number_is_not_taken_for_one_of_the_family():
    core = Core()
    process = seen(core.pid)
    assert process.is_there
    assert not replace(process, started=process.started - 1).is_there
    ProcessFamily([core]).kill()
    core.popen.stdout.close()
