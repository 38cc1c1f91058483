"""Placeholders and cache keys, on vLLM's own processor without an engine."""

import pytest
import torch
from PIL import Image
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.inputs import ProcessorInputs

import patches
from patches.config import Retention, SieveConfig
from patches.selection import SELECTORS, num_kept
from tests.checkpoints import build_published_like
from tests.pictures import noise

IMAGE = 32000
SIZES = [(1, 1), (30, 100), (100, 30), (336, 336), (337, 335), (640, 480), (50, 900)]


def make_processor(folder, **retention):
    patches.register()
    config = ModelConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=2048,
        hf_overrides=SieveConfig(retention=Retention(**retention)).hf_overrides(),
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def processor(published):
    return make_processor(published)


def process(processor, images, **kwargs):
    items = processor.info.parse_mm_data({"image": images})
    return processor([1, *[IMAGE] * len(images), 5], items, hf_processor_mm_kwargs=kwargs)


def keys(processor, image, **kwargs):
    items = processor.info.parse_mm_data({"image": [image]})
    inputs = ProcessorInputs([1, IMAGE], items, hf_processor_mm_kwargs=kwargs)
    return processor._get_mm_hashes(inputs)["image"]


@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.6, 0.401, 0.4, 0.2, 0.05, 1e-6])
@pytest.mark.parametrize("num_images", [1, 3])
def test_placeholders_equal_the_rows_the_worker_is_told_to_make(processor, ratio, num_images):
    images = [noise(seed, SIZES[seed % len(SIZES)]) for seed in range(num_images)]
    out = process(processor, images, retention_ratio=ratio)
    told = [int(item["num_kept"].data) for item in out["mm_kwargs"]["image"]]
    assert told == [num_kept(576, ratio)] * num_images
    assert out["prompt_token_ids"].count(IMAGE) == sum(told)
    assert [p.length for p in out["mm_placeholders"]["image"]] == told


@pytest.mark.parametrize("size", SIZES)
def test_any_size_becomes_one_square_of_576_patches(processor, size):
    out = process(processor, [noise(0, size)])
    assert out["prompt_token_ids"].count(IMAGE) == 576
    assert out["mm_kwargs"]["image"][0]["pixel_values"].data.shape == (3, 336, 336)


def test_equal_work_has_one_key(processor, published):
    image = noise()
    default = keys(processor, image)
    assert keys(processor, image, retention_ratio=1.0, selector="cls") == default
    assert keys(processor, image, retention_ratio=0.4) == keys(
        processor, image, retention_ratio=0.4001
    )
    assert keys(make_processor(published, ratio=0.4), image) == keys(
        processor, image, retention_ratio=0.4
    )


def test_different_work_has_different_keys(processor, published):
    image = noise()
    found = [
        keys(processor, image, retention_ratio=ratio, selector=selector)[0]
        for ratio in (0.8, 0.4, 0.05)
        for selector in SELECTORS
    ]
    found.append(keys(processor, image)[0])
    found.append(keys(processor, noise(1))[0])
    assert len(set(found)) == len(found)
    assert keys(make_processor(published, ratio=0.3), image) != keys(processor, image)


def test_at_ratio_one_the_selector_does_not_matter(processor):
    assert keys(processor, noise(), selector="random") == keys(processor, noise(), selector="cls")


def test_a_selectors_version_is_in_the_key(processor, monkeypatch):
    before = keys(processor, noise(), retention_ratio=0.4)
    newer = SELECTORS["cls"].__class__(score=SELECTORS["cls"].score, version=2)
    monkeypatch.setitem(SELECTORS, "cls", newer)
    assert keys(processor, noise(), retention_ratio=0.4) != before


def test_equal_bytes_in_another_shape_have_another_key(processor):
    wide = noise(3, (100, 30))
    tall = Image.frombytes("RGB", (30, 100), wide.tobytes())
    assert keys(processor, wide) != keys(processor, tall)


def test_cropping_and_padding_checkpoints_differ_in_pixels_and_key(processor, tmp_path):
    padding = make_processor(build_published_like(tmp_path / "pad", pad_to_square=True))
    image = noise(2, (640, 240))
    crop, pad = (process(p, [image])["mm_kwargs"]["image"][0] for p in (processor, padding))
    assert not torch.equal(crop["pixel_values"].data, pad["pixel_values"].data)
    assert keys(processor, image) != keys(padding, image)
    top = pad["pixel_values"].data[:, :50]
    assert top.std(dim=(1, 2)).max() < 0.02  # padding bars of one colour above the picture


def test_memory_is_profiled_with_all_patches_whatever_the_default(published):
    processor = make_processor(published, ratio=0.05)
    dummy = processor.get_dummy_mm_inputs({"image": 1})
    assert int(dummy["mm_kwargs"]["image"][0]["num_kept"].data) == 576


def test_random_seeds_follow_the_pixels_and_nothing_else(processor):
    def seeds(image, ratio):
        out = process(processor, [image], retention_ratio=ratio, selector="random")
        return int(out["mm_kwargs"]["image"][0]["seed"].data)

    assert seeds(noise(1), 0.4) == seeds(noise(1), 0.2) > 0
    assert seeds(noise(1), 0.4) != seeds(noise(2), 0.4)


@pytest.mark.parametrize("kwargs", [{"retention_ratio": 0}, {"selector": "best"}])
def test_a_bad_retention_is_a_value_error_in_the_processor_too(processor, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        process(processor, [noise()], **kwargs)


def test_images_as_embeddings_are_refused(processor):
    with pytest.raises(ValueError, match="embed"):
        process(processor, torch.randn(1, 576, 64))
