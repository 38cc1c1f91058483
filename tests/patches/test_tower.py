"""The [CLS] row against the whole attention matrix, and sharded over heads."""

import pytest
import torch

from patches.config import check_checkpoint
from patches.tower import cls_attention, cls_logits

IMAGES, POSITIONS, HEADS, WIDTH = 3, 17, 4, 32


@pytest.fixture
def query_key():
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, POSITIONS, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cls_row(query, key, num_heads, total_heads):
    """The row of one layer."""
    return cls_attention([cls_logits(query, key, num_heads)], total_heads)[:, 0]


def whole_attention(query, key):
    def heads(states):
        return states.view(IMAGES, POSITIONS, HEADS, -1).transpose(1, 2)

    logits = heads(query) @ heads(key).transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
    return logits.softmax(dim=-1)


def test_the_row_is_the_mean_over_heads_of_the_first_row_without_itself(query_key):
    expected = whole_attention(*query_key)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(cls_row(*query_key, HEADS, HEADS), expected)


def test_rows_of_head_shards_add_up_to_the_whole(query_key):
    query, key = query_key
    half = WIDTH // 2
    shards = [
        cls_row(query[..., part], key[..., part], HEADS // 2, HEADS)
        for part in (slice(0, half), slice(half, WIDTH))
    ]
    torch.testing.assert_close(sum(shards), cls_row(query, key, HEADS, HEADS))


def test_the_row_is_float32_and_near_the_exact_one_for_a_bfloat16_tower(query_key):
    query, key = (states.bfloat16() for states in query_key)
    row = cls_row(query, key, HEADS, HEADS)
    assert row.dtype == torch.float32
    exact = cls_row(query.float(), key.float(), HEADS, HEADS)
    torch.testing.assert_close(row, exact, rtol=0.02, atol=0)  # logits are the tower's own bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -3}, "vision_feature_layer=-3"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer="),
        ({"vision_feature_select_strategy": "full"}, "select_strategy='full'"),
    ],
)
def test_checkpoints_that_the_plugin_cannot_serve_are_refused(published, changes, message):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(published)
    check_checkpoint(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(config)
