"""The tower's cache: what it answers for, what it forgets, what it never mixes up."""

import pytest
import torch

from patches.tower_cache import Seen, TowerCache, pixels_key

PATCHES, WIDTH, LAYERS = 4, 8, 3
ENTRY = 4 * (PATCHES * WIDTH + LAYERS * PATCHES)


class Tower:
    """Features and attention that tell which image they are of."""

    def __init__(self):
        self.calls = []

    def __call__(self, pixels, *, needs_cls):
        names = pixels[:, 0, 0, 0]
        self.calls.append(names.tolist())
        features = names.view(-1, 1, 1).expand(-1, PATCHES, WIDTH).contiguous()
        if not needs_cls:
            return features, features.new_zeros(len(pixels), 1, PATCHES)
        return features, (10 * names).view(-1, 1, 1).expand(-1, LAYERS, PATCHES).contiguous()


def images(*names):
    return torch.stack([torch.full((3, 2, 2), float(name)) for name in names])


def keys(*names):
    return [tuple(pixels_key(image)) for image in images(*names)]


def look(cache, tower, *names, needs_cls=True, with_keys=True):
    found = cache.through(
        tower, images(*names), keys(*names) if with_keys else None, needs_cls=needs_cls
    )
    return [(seen.features[0, 0].item(), seen.attention[-1, 0].item()) for seen in found]


def test_only_new_images_go_through_the_tower_and_all_come_back_in_their_order():
    cache, tower = TowerCache(1 << 20), Tower()
    assert look(cache, tower, 1, 2) == [(1, 10), (2, 20)]
    assert look(cache, tower, 3, 2, 4, 1) == [(3, 30), (2, 20), (4, 40), (1, 10)]
    assert look(cache, tower, 4, 3) == [(4, 40), (3, 30)]
    assert tower.calls == [[1, 2], [3, 4]]


def test_an_image_without_attention_goes_through_again_for_it_but_not_for_less():
    cache, tower = TowerCache(1 << 20), Tower()
    assert look(cache, tower, 1, needs_cls=False) == [(1, 0)]
    assert look(cache, tower, 1) == [(1, 10)]
    assert look(cache, tower, 1, needs_cls=False) == [(1, 10)]
    assert tower.calls == [[1], [1]]


def test_without_keys_nothing_is_looked_up_or_kept():
    cache, tower = TowerCache(1 << 20), Tower()
    look(cache, tower, 1)
    look(cache, tower, 1, with_keys=False)
    look(cache, tower, 2, with_keys=False)
    look(cache, tower, 2)
    assert tower.calls == [[1], [1], [2], [2]]


def test_the_image_used_longest_ago_is_forgotten_first_and_the_bound_holds():
    cache, tower = TowerCache(2 * ENTRY), Tower()
    look(cache, tower, 1)
    look(cache, tower, 2)
    look(cache, tower, 1)
    look(cache, tower, 3)
    assert (len(cache), cache.num_bytes) == (2, 2 * ENTRY)
    look(cache, tower, 1)
    look(cache, tower, 2)
    assert tower.calls == [[1], [2], [3], [2]]


@pytest.mark.parametrize("max_bytes", [0, ENTRY - 1])
def test_what_does_not_fit_is_not_kept(max_bytes):
    cache, tower = TowerCache(max_bytes), Tower()
    look(cache, tower, 1)
    look(cache, tower, 1)
    assert tower.calls == [[1], [1]]
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_an_entry_does_not_hold_the_batch_that_it_came_with():
    cache = TowerCache(1 << 20)
    batch = torch.arange(2.0 * PATCHES * WIDTH).view(2, PATCHES, WIDTH)
    cache.put((1, 2), Seen(batch[1], torch.zeros(1, PATCHES), False))
    kept = cache.get((1, 2), needs_cls=False)
    assert kept.features.untyped_storage().nbytes() == PATCHES * WIDTH * 4
    batch.zero_()
    assert kept.features.min() == PATCHES * WIDTH


def test_an_entry_that_comes_again_counts_once():
    cache = TowerCache(1 << 20)
    for _ in range(3):
        cache.put((1,), Seen(torch.zeros(PATCHES, WIDTH), torch.zeros(LAYERS, PATCHES), True))
    assert (len(cache), cache.num_bytes) == (1, ENTRY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_equal_for_equal_pixels_only(dtype):
    pixels = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = pixels.clone()
    other[2, 5, 5] += 0.25
    assert pixels_key(pixels) == pixels_key(pixels.clone())
    assert pixels_key(pixels) != pixels_key(other)
    assert pixels_key(pixels.transpose(1, 2)) != pixels_key(pixels)
    assert all(-(2**63) <= word < 2**63 for word in pixels_key(pixels))
