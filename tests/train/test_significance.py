import time

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score

from tests.train.evaluated import marked
from train.metrics import METRICS, measure
from train.significance import estimate, estimate_difference, mcnemar


def drawn(seed, count=300, accuracy=0.7):
    rng = np.random.default_rng(seed)
    true = rng.choice(3, count, p=[0.6, 0.3, 0.1])
    guessed = np.where(rng.random(count) < accuracy, true, rng.choice(3, count))
    return marked(true, guessed)


def test_the_figure_itself_is_the_measured_one():
    one = drawn(0)
    figures, estimates = measure(one), estimate(one)
    for name in METRICS:
        assert estimates[name].value == pytest.approx(figures[name])
        assert estimates[name].low < figures[name] < estimates[name].high


def test_intervals_agree_with_scipys_bootstrap_over_posts():
    one = drawn(1)
    scores = {
        "accuracy": accuracy_score,
        "macro_f1": lambda t, g: f1_score(t, g, average="macro"),
        "weighted_f1": lambda t, g: f1_score(t, g, average="weighted"),
    }
    ours = estimate(one, num_resamples=5000)
    for name, score in scores.items():
        theirs = bootstrap(
            (one.true, one.guessed),
            score,
            paired=True,
            vectorized=False,
            n_resamples=500,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert ours[name].low == pytest.approx(theirs.low, abs=0.015)
        assert ours[name].high == pytest.approx(theirs.high, abs=0.015)


def test_the_same_seed_gives_the_same_interval():
    one = drawn(2)
    assert estimate(one, seed=3) == estimate(one, seed=3)
    assert estimate(one, seed=3) != estimate(one, seed=4)


def test_a_model_does_not_differ_from_itself():
    one = drawn(3)
    for difference in estimate_difference(one, one).values():
        assert (difference.low, difference.value, difference.high) == (0, 0, 0)
        assert not difference.is_above_zero
    assert mcnemar(one, one).p_value == 1.0


def test_pairing_narrows_the_interval_of_a_difference():
    one = drawn(4)
    guessed = one.guessed.copy()
    guessed[:5] = (one.true[:5] + 1) % 3
    other = marked(one.true, guessed)
    paired, apart = estimate_difference(one, other)["accuracy"], estimate(one)["accuracy"]
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_a_better_model_is_told_from_a_worse_one():
    truth = drawn(5).true
    rng = np.random.default_rng(6)
    good = marked(truth, np.where(rng.random(300) < 0.9, truth, 2 - truth))
    bad = marked(truth, np.where(rng.random(300) < 0.6, truth, 2 - truth))
    assert estimate_difference(good, bad)["macro_f1"].is_above_zero
    assert estimate_difference(bad, good)["macro_f1"].high < 0
    assert mcnemar(good, bad).p_value < 0.001


@pytest.mark.parametrize(("only_first", "only_second", "p_value"), [(5, 0, 0.0625), (3, 3, 1.0)])
def test_mcnemar_is_the_exact_binomial_test_of_disagreements(only_first, only_second, p_value):
    count = only_first + only_second + 10
    right = np.zeros(count, dtype=int)
    first, second = right.copy(), right.copy()
    second[:only_first] = 1
    first[only_first : only_first + only_second] = 1
    result = mcnemar(marked(right, first), marked(right, second))
    assert (result.only_first, result.only_second) == (only_first, only_second)
    assert result.p_value == pytest.approx(p_value)


def test_answers_to_different_posts_are_not_compared():
    with pytest.raises(AssertionError, match="same posts"):
        estimate_difference(drawn(0), drawn(0, count=200))


def test_a_label_that_a_resample_misses_does_not_count_as_wrong():
    one = marked([0] * 40 + [2], [0] * 40 + [2])
    assert estimate(one)["macro_f1"].low == 1.0


def test_intervals_of_a_whole_evaluation_take_seconds():
    cells = [drawn(seed, count=450) for seed in range(24)]
    started = time.perf_counter()
    for cell in cells:
        estimate(cell)
        estimate_difference(cell, marked(cell.true, cells[0].guessed))
    assert time.perf_counter() - started < 5
