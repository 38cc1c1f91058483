from dataclasses import replace

import numpy as np
import pytest

from tests.train.evaluated import marked
from train.calibration import NUM_BINS, expected_calibration_error, reliability


def confident(confidence, right):
    guessed = np.where(right, 0, 1)
    return replace(marked(np.zeros(len(guessed), int), guessed), confidence=np.asarray(confidence))


def test_honest_probabilities_have_no_error():
    bins = reliability(confident([0.75] * 4, [True, True, True, False]))
    assert expected_calibration_error(bins) == pytest.approx(0)


def test_certainty_that_is_wrong_half_the_time_errs_by_half():
    bins = reliability(confident([1.0] * 4, [True, False, True, False]))
    assert expected_calibration_error(bins) == pytest.approx(0.5)
    assert bins[0].high == 1.0


def test_the_error_is_the_mean_gap_weighted_by_posts():
    bins = reliability(confident([0.9, 0.9, 0.9, 0.5], [True, True, False, True]))
    assert expected_calibration_error(bins) == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.5)


def test_every_post_is_in_one_bin_edges_and_rounding_included():
    confidence = [*np.linspace(0, 1, 31), 1.0000001]
    bins = reliability(confident(confidence, [True] * 32))
    assert sum(item.count for item in bins) == 32
    assert len(bins) == NUM_BINS
    assert all(item.low < item.high for item in bins)


def test_answers_without_probabilities_have_no_calibration():
    bins = reliability(marked([0, 1], [0, 1]))
    assert bins == []
    assert expected_calibration_error(bins) is None
