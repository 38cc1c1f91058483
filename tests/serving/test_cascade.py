"""A low ratio first, a higher one where the answer is not sure."""

import random

import pytest
from PIL import Image

from patches.config import Retention
from serving.batch.calibrate import Pair, find_bar, wilson
from serving.batch.outcomes import Answer
from serving.cascade import Cascade, climb
from serving.catalogue import Catalogue, Choices
from serving.errors import BadRequestError
from serving.labeler import Labeler
from serving.structures import STRUCTURES
from tests.serving.fake_engine import FakeEngine


@pytest.fixture
def labeler(demo_tokenizer):
    catalogue = Catalogue(
        base="base", structures=STRUCTURES, structure="sentiment", retention=Retention()
    )
    return Labeler(FakeEngine(), catalogue, demo_tokenizer)


PICTURE = Image.new("RGB", (8, 8))


async def ratios_asked(labeler, confidence, images=(PICTURE,)):
    cascade = Cascade(ratios=(0.2, 0.5, 1.0), confidence=confidence)
    climbed = await climb(labeler, "a text", list(images), Choices(), cascade, "id")
    asked = [request.retention.ratio for request in labeler.engine.requests]
    assert [ratio for ratio, _ in climbed.steps] == asked
    assert climbed.num_asked == len(asked)
    assert climbed.result.settings.retention.ratio == asked[-1]
    return asked, climbed


async def test_a_sure_answer_ends_the_cascade(labeler):
    asked, climbed = await ratios_asked(labeler, confidence=0.01)
    assert asked == [0.2]
    assert climbed.steps[0][1] >= 0.01


async def test_an_answer_that_is_never_sure_climbs_to_the_last_ratio(labeler):
    asked, _ = await ratios_asked(labeler, confidence=1.0)
    assert asked == [0.2, 0.5, 1.0]


async def test_a_post_without_images_is_asked_once(labeler):
    asked, _ = await ratios_asked(labeler, confidence=1.0, images=())
    assert asked == [1.0]


async def test_without_a_cascade_the_request_keeps_its_own_ratio(labeler):
    climbed = await climb(labeler, "a", [PICTURE], Choices(retention_ratio=0.3), None, "id")
    assert climbed.steps is None
    assert climbed.num_asked == 1
    assert climbed.result.settings.retention.ratio == 0.3


@pytest.mark.parametrize(
    ("ratios", "confidence", "ratio", "param"),
    [
        ([0.2], 0.9, None, "cascade"),
        ([1.0, 0.2], 0.9, None, "cascade"),
        ([0.2, 0.2], 0.9, None, "cascade"),
        ([0.0, 1.0], 0.9, None, "cascade"),
        ([0.2, 1.1], 0.9, None, "cascade"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.9, None, "cascade"),
        ([0.2, float("nan")], 0.9, None, "cascade"),
        ([0.2, 1.0], 0.0, None, "confidence"),
        ([0.2, 1.0], 1.5, None, "confidence"),
        ([0.2, 1.0], float("nan"), None, "confidence"),
        ([0.2, 1.0], None, None, "confidence"),
        (None, 0.9, None, "cascade"),
        ([0.2, 1.0], 0.9, 0.5, "retention_ratio"),
    ],
)
def test_a_cascade_that_makes_no_sense_is_refused(ratios, confidence, ratio, param):
    with pytest.raises(BadRequestError) as caught:
        Cascade.asked(ratios, confidence, ratio)
    assert caught.value.param == param


def answer(label, confidence):
    return Answer(
        model="m",
        version="",
        labels={"sentiment": label},
        probabilities={},
        confidence=confidence,
        ratio=1.0,
        selector="cls",
        kept=1,
        visual_tokens=1,
        patches=1,
    )


def pairs_of(*items):
    return [Pair(low=answer(low, sure), high=answer("a", 1.0), known={}) for low, sure in items]


def agreement_at(pairs, bar):
    return sum(pair.agrees or pair.low.confidence < bar for pair in pairs) / len(pairs)


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 0.95])
def test_the_bar_is_the_lowest_that_is_expected_to_agree_as_often_as_wanted(wanted):
    pairs = pairs_of(
        *(("a" if i % 3 else "b", (i * 37 % 101) / 101) for i in range(100)), ("a", 0.999)
    )
    bar = find_bar(pairs, wanted)
    num_wrong = [round((1 - agreement_at(pairs, p.low.confidence)) * len(pairs)) for p in pairs]
    bars = [
        pair.low.confidence
        for pair, wrong in zip(pairs, num_wrong, strict=True)
        if (wrong + 1) / (len(pairs) + 1) <= 1 - wanted + 1e-9
    ]
    assert bar == min(bars)


def test_a_bar_keeps_its_word_on_posts_that_had_no_say():
    order = random.Random(0)

    def draw(num):
        sures = [order.random() for _ in range(num)]
        return pairs_of(*(("a" if order.random() < sure else "b", sure) for sure in sures))

    found = [agreement_at(draw(400), find_bar(draw(80), 0.9)) for _ in range(300)]
    assert 0.9 <= sum(found) / len(found) < 0.93


def test_where_sure_answers_disagree_all_go_up():
    pairs = pairs_of(("a", 0.2), ("b", 0.99))
    assert agreement_at(pairs, find_bar(pairs, 1.0)) == 1.0


def test_where_all_agree_none_goes_up():
    pairs = pairs_of(*(("a", 0.2 + i / 100) for i in range(50)))
    assert find_bar(pairs, 0.95) == 0.2


def test_full_agreement_is_promised_by_sending_all_up():
    assert find_bar(pairs_of(("a", 0.2), ("a", 0.9)), 1.0) == 1.0


def test_wilson_interval_is_the_published_one():
    low, high = wilson(8, 10)  # Wilson 1927: 0.490, 0.943
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
