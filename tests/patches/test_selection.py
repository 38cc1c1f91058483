"""Properties of the count, the ranking and every selector."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patches.config import Retention, SieveConfig, read_config, resolve_retention
from patches.selection import SELECTORS, PatchView, num_kept, select


def view(num_patches=64, kept=26, seed=7, layers=4):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(layers, num_patches, generator=generator)
    return PatchView(
        features=torch.randn(num_patches, 8, generator=generator),
        cls_attention=attention / attention.sum(dim=-1, keepdim=True),
        feature_layer=layers - 2,
        num_kept=kept,
        seed=seed,
    )


@given(st.integers(1, 4096), st.floats(0, 1, exclude_min=True))
def test_kept_count_is_the_rounded_share_and_never_zero(patches, ratio):
    kept = num_kept(patches, ratio)
    assert 1 <= kept <= patches
    assert kept == max(1, math.floor(ratio * patches + 0.5))


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(576, 0.6, 346), (576, 0.4, 230), (576, 0.05, 29), (64, 0.05, 3), (64, 1.0, 64), (9, 1e-9, 1)],
)
def test_kept_count_of_known_cases(patches, ratio, kept):
    assert num_kept(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_ratios_outside_the_unit_interval_are_refused(ratio):
    with pytest.raises(ValueError, match="0, 1"):
        num_kept(64, ratio)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kept", [1, 3, 26, 63, 64])
def test_every_selector_keeps_exactly_k_distinct_ascending_patches(selector, kept):
    indices = select(selector, view(kept=kept)).tolist()
    assert len(indices) == kept
    assert indices == sorted(set(indices))
    assert set(indices) <= set(range(64))


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_is_a_pure_function(selector):
    assert torch.equal(select(selector, view()), select(selector, view()))


def test_cls_keeps_the_patches_with_the_highest_mean_attention():
    one = view(kept=5)
    best = set(one.cls_attention.mean(dim=0).topk(5).indices.tolist())
    assert set(select("cls", one).tolist()) == best


def test_cls_last_reads_the_feature_layer_only():
    one = view(kept=5)
    best = set(one.cls_attention[2].topk(5).indices.tolist())
    assert set(select("cls-last", one).tolist()) == best


def test_equal_scores_go_to_the_lower_index():
    flat = PatchView(
        features=torch.zeros(6, 1),
        cls_attention=torch.full((2, 6), 0.1),
        feature_layer=0,
        num_kept=4,
        seed=0,
    )
    assert select("cls", flat).tolist() == [0, 1, 2, 3]


def test_random_depends_on_the_seed_and_is_nested_over_k():
    assert select("random", view(seed=1)).tolist() != select("random", view(seed=2)).tolist()
    few, many = select("random", view(kept=5)), select("random", view(kept=20))
    assert set(few.tolist()) < set(many.tolist())


def test_stride_spreads_over_the_whole_image():
    assert select("stride", view(kept=4)).tolist() == [8, 24, 40, 56]


@pytest.mark.parametrize("value", [0, -1, 1.01, float("nan"), "half", None, True])
def test_retention_names_the_bad_ratio_and_what_is_allowed(value):
    with pytest.raises(ValueError, match="retention_ratio=.*up to 1"):
        Retention(ratio=value)


def test_retention_names_the_bad_selector_and_those_there_are():
    with pytest.raises(ValueError, match="selector='best' is unknown.*cls"):
        Retention(selector="best")


def test_settings_survive_the_way_through_hf_overrides():
    settings = SieveConfig(retention=Retention(ratio=0.3, selector="stride"), tower_batch_size=3)
    config = type("Config", (), {"sieve": settings.hf_overrides()["sieve"]})
    assert read_config(config) == settings


def test_a_request_overrides_the_default_field_by_field():
    default = Retention(ratio=0.4, selector="cls-last")
    assert resolve_retention({}, default) == default
    assert resolve_retention({"retention_ratio": 0.2}, default).selector == "cls-last"
    assert resolve_retention({"selector": "random"}, default).ratio == 0.4
