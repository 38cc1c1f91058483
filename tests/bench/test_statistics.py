import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio

times = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@given(times)
def test_a_variant_beside_itself_has_ratio_one(seconds):
    found = paired_ratio(seconds, seconds)
    assert (found.low, found.median, found.high) == (1.0, 1.0, 1.0)


@given(times, st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly_whatever_the_rounds_noise(seconds, factor):
    found = paired_ratio([factor * each for each in seconds], seconds)
    assert found.low == pytest.approx(factor)
    assert found.high == pytest.approx(factor)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=12))
def test_the_interval_holds_the_median_and_stays_within_the_ratios(pairs):
    over, under = zip(*pairs, strict=True)
    found = paired_ratio(over, under)
    ratios = [a / b for a, b in pairs]
    assert min(ratios) <= found.low <= found.median <= found.high <= max(ratios)
    assert found.num_rounds == len(pairs)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        ratios = 1.25 * np.exp(rng.normal(0, 0.1, 20))
        found = paired_ratio(ratios, np.ones(20))
        covered += found.low <= 1.25 <= found.high
    assert 175 <= covered <= 200


def test_the_same_samples_give_the_same_interval():
    over, under = [1.0, 2.0, 3.5, 1.2], [1.0, 1.1, 0.9, 1.0]
    assert paired_ratio(over, under) == paired_ratio(over, under)


def test_more_rounds_narrow_the_interval():
    ratios = np.exp(np.random.default_rng(0).normal(0, 0.2, 400))
    few, many = (paired_ratio(ratios[:n], np.ones(n)) for n in (10, 400))
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("over", "under"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])]
)
def test_what_cannot_be_paired_is_refused(over, under):
    with pytest.raises(ValueError, match="ratios need|numerators for"):
        paired_ratio(over, under)


def test_the_median_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        median([])


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 99))
def test_every_round_runs_every_variant_once(num_variants, num_rounds, seed):
    variants = [f"v{index}" for index in range(num_variants)]
    order = list(interleaved(variants, num_rounds, seed))
    assert order == list(interleaved(variants, num_rounds, seed))
    for index in range(num_rounds):
        assert sorted(name for found, name in order if found == index) == variants
    assert [index for index, _ in order] == sorted(index for index, _ in order)


def test_no_variant_always_goes_first():
    order = list(interleaved(["a", "b"], 50, 0))
    first = [name for _, name in order[::2]]
    assert 10 < first.count("a") < 40


def test_samples_are_paired_by_round_not_by_arrival():
    samples = [
        Sample(round=1, variant="b", seconds=4.0),
        Sample(round=0, variant="a", seconds=1.0),
        Sample(round=0, variant="b", seconds=2.0),
        Sample(round=1, variant="a", seconds=3.0),
    ]
    assert by_variant(samples) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    with pytest.raises(ValueError, match="not paired"):
        by_variant(samples[:3])
