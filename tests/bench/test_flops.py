import pytest

from bench.flops import PAPER_SPEEDUPS, RATIOS, Shape

# Worked out apart from this code, for LLaVA-1.5-7B with 50 text tokens.
SIX_TOKENS = {0.8: 1.21, 0.6: 1.54, 0.4: 2.12, 0.2: 3.36, 0.05: 5.94}
PREFILL = {0.8: 1.23, 0.6: 1.59, 0.4: 2.25, 0.2: 3.83, 0.05: 8.0}


@pytest.mark.parametrize(("ratio", "expected"), SIX_TOKENS.items())
def test_the_model_gives_the_known_speedups_of_a_six_token_answer(ratio, expected):
    found = Shape().speedup(ratio, text_tokens=50, output_tokens=6)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("ratio", "expected"), PREFILL.items())
def test_the_model_gives_the_known_speedups_of_the_prefill_alone(ratio, expected):
    assert Shape().prefill_speedup(ratio, text_tokens=50) == pytest.approx(expected, rel=0.02)


def test_the_tower_is_the_share_of_a_request_that_is_known():
    shape, sizes = Shape(), {"text_tokens": 50, "output_tokens": 6}
    assert shape.tower_flops() == pytest.approx(0.366e12, rel=0.005)
    assert shape.tower_flops() / shape.request_flops(1.0, **sizes) == pytest.approx(0.04, abs=0.005)
    assert shape.tower_flops() / shape.request_flops(0.05, **sizes) == pytest.approx(0.25, abs=0.01)


def test_fewer_tokens_never_cost_more():
    costs = [Shape().request_flops(ratio, text_tokens=50, output_tokens=1) for ratio in RATIOS]
    assert costs == sorted(costs, reverse=True)


def test_one_token_decodes_nothing_after_the_prefill():
    assert Shape().decode_flops(600, 1) == 0


def test_every_ratio_but_the_whole_has_a_speedup_of_the_paper():
    assert set(PAPER_SPEEDUPS) == set(RATIOS) - {1.0}
