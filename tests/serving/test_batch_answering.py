"""One post's answers: equal posts once, several models, cascades, rows that ask by themselves."""

import asyncio

import numpy as np
import pytest

from serving.batch.answering import Answerer, Asked
from serving.batch.outcomes import Failure
from serving.batch.prepare import Prepared
from serving.cascade import Cascade
from serving.catalogue import Choices
from serving.errors import EngineDeadError, OverloadedError
from serving.labeler import Labeler
from serving.manifest import Manifest
from serving.posts import Post
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_labeler import catalogue

TEXT_ONLY = Prepared(images=(), key=b"")
PICTURED = Prepared(images=(np.zeros((8, 8, 3), dtype=np.uint8),), key=b"one")


class SlowEngine(FakeEngine):
    """Takes a moment; its first calls end in the errors that it is given."""

    def __init__(self, *errors):
        super().__init__()
        self.errors, self.calls = list(errors), 0

    async def generate(self, request):
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.errors:
            raise self.errors.pop(0)
        return await super().generate(request)


@pytest.fixture
def labeler(demo_tokenizer):
    adapters = {"first": Manifest(label_structure="llavac"), "second": Manifest()}
    return lambda engine: Labeler(engine, catalogue(adapters), demo_tokenizer)


def asked(*models, cascade=None, is_fixed=False, max_text_chars=1000, **choices):
    return Asked(
        models=models,
        choices=Choices(**choices),
        cascade=cascade,
        max_text_chars=max_text_chars,
        is_fixed=is_fixed,
    )


def post(number=0, text="a day", **values):
    return Post(id=str(number), text=text, **values)


async def test_equal_posts_are_asked_once_also_at_the_same_time(labeler):
    engine = SlowEngine()
    answerer, to = Answerer(asked()), labeler(engine)
    together = await asyncio.gather(*(answerer.answer(to, post(i), TEXT_ONLY) for i in range(20)))
    later = await answerer.answer(to, post(99), TEXT_ONLY)
    assert engine.calls == 1
    assert [is_repeat for _, is_repeat in (*together, later)] == [False] + [True] * 20
    assert len({repr(answers) for answers, _ in (*together, later)}) == 1


@pytest.mark.parametrize(
    ("other", "prepared"),
    [
        (post(text="another day"), TEXT_ONLY),
        (post(), PICTURED),
        (post(asks={"retention_ratio": 0.2}), TEXT_ONLY),
    ],
)
async def test_posts_that_differ_in_anything_are_asked_each(labeler, other, prepared):
    engine = SlowEngine()
    answerer, to = Answerer(asked()), labeler(engine)
    await answerer.answer(to, post(), TEXT_ONLY)
    _, is_repeat = await answerer.answer(to, other, prepared)
    assert (engine.calls, is_repeat) == (2, False)


async def test_after_a_failure_one_equal_post_is_asked_for_all_that_wait(labeler):
    engine = SlowEngine(OverloadedError("busy"))
    answerer, to = Answerer(asked()), labeler(engine)
    done = await asyncio.gather(
        *(answerer.answer(to, post(i), TEXT_ONLY) for i in range(9)), return_exceptions=True
    )
    assert isinstance(done[0], Failure)
    assert done[0].can_retry
    assert [is_repeat for _, is_repeat in done[1:]] == [False] + [True] * 7
    assert engine.calls == 2


async def test_those_that_wait_end_with_the_run_that_is_stopped(labeler):
    engine = SlowEngine(*[EngineDeadError("gone")] * 9)
    answerer, to = Answerer(asked()), labeler(engine)

    async def run():
        async with asyncio.TaskGroup() as tasks:
            for number in range(9):
                tasks.create_task(answerer.answer(to, post(number), TEXT_ONLY))

    with pytest.raises(ExceptionGroup) as caught:
        await run()
    assert [type(error) for error in caught.value.exceptions] == [EngineDeadError]
    assert engine.calls == 1  # nobody asks a dead engine in the meantime


async def test_several_models_answer_in_their_order_by_their_own_structures(labeler):
    answerer = Answerer(asked("second", "first", "base"))
    answers, _ = await answerer.answer(labeler(FakeEngine()), post(), PICTURED)
    assert [answer.model for answer in answers] == ["second", "first", "base"]
    assert [set(answer.labels) for answer in answers] == [
        {"sentiment"},
        {"image", "text", "multimodal"},
        {"sentiment"},
    ]
    for answer in answers:
        assert answer.patches == 64
        for shares in answer.probabilities.values():
            assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        winners = [answer.probabilities[field][label] for field, label in answer.labels.items()]
        assert answer.confidence == min(winners)


@pytest.mark.parametrize(("bar", "num_asked"), [(0.01, 1), (1.0, 2)])
async def test_a_cascade_goes_up_only_below_its_bar(labeler, bar, num_asked):
    cascade = Cascade(ratios=(0.25, 1.0), confidence=bar)
    engine = SlowEngine()
    answers, _ = await Answerer(asked(cascade=cascade)).answer(labeler(engine), post(), PICTURED)
    assert (answers[0].num_asked, engine.calls) == (num_asked, num_asked)
    went_up = num_asked > 1
    assert (answers[0].ratio, answers[0].kept) == ((1.0, 64) if went_up else (0.25, 16))
    assert answers[0].visual_tokens == (80 if went_up else 16)


async def test_a_row_with_a_ratio_of_its_own_has_no_cascade_and_may_name_its_model(labeler):
    cascade = Cascade(ratios=(0.25, 1.0), confidence=1.0)
    own = post(asks={"retention_ratio": 0.5, "model": "first"})
    answerer = Answerer(asked("second", cascade=cascade))
    answers, _ = await answerer.answer(labeler(FakeEngine()), own, PICTURED)
    assert [(a.model, a.ratio, a.num_asked) for a in answers] == [("first", 0.5, 1)]


@pytest.mark.parametrize(
    ("one", "options", "code"),
    [
        (post(text=""), {}, "empty_post"),
        (post(text="x" * 11), {"max_text_chars": 10}, "text_too_long"),
        (post(asks={"model": "first"}), {"is_fixed": True}, "fixed_columns"),
        (post(asks={"label_structure": "llavac"}), {"is_fixed": True}, "fixed_columns"),
        (post(asks={"model": "nobody"}), {}, "model_not_found"),
        (post(asks={"retention_ratio": 7.0}), {}, "invalid_request_error"),
    ],
)
async def test_what_a_row_may_not_ask_is_a_failure_of_its_prompt(labeler, one, options, code):
    with pytest.raises(Failure) as caught:
        await Answerer(asked(**options)).answer(labeler(FakeEngine()), one, TEXT_ONLY)
    assert (caught.value.stage, caught.value.code) == ("prompt", code)
    assert not caught.value.can_retry
