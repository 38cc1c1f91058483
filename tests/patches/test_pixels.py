"""Our way to pixels beside Hugging Face's, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from patches.pixels import PixelScale
from serving.fitting import fit
from serving.settings import DEMO
from tests.checkpoints import build_published_like
from tests.pictures import noise


@pytest.fixture(scope="module", params=["demo", "crop", "pad"])
def processor(request, tmp_path_factory):
    if request.param == "demo":
        return AutoImageProcessor.from_pretrained(DEMO / "base")
    folder = tmp_path_factory.mktemp(request.param)
    build_published_like(folder, pad_to_square=request.param == "pad")
    return AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (50, 900), (336, 336)])
def test_fitted_pictures_have_hugging_faces_pixels(processor, size):
    images = [Image.fromarray(fit(processor, noise(seed, size))) for seed in range(3)]
    ours = PixelScale.of(processor)(images)
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_other_sizes_and_kinds_of_pictures_are_left_to_hugging_face(processor):
    scale = PixelScale.of(processor)
    fitted = Image.fromarray(fit(processor, noise(0, (80, 60))))
    assert scale([fitted]) is not None
    others = (noise(0, (80, 60)), fitted.convert("L"), np.asarray(fitted), fitted.convert("RGBA"))
    for other in others:
        assert scale([fitted, other]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"crop_size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
        {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}},
    ],
)
def test_a_processor_that_does_anything_else_is_left_alone(changes):
    usual = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    assert PixelScale.of(CLIPImageProcessor(**usual)) is not None
    assert PixelScale.of(CLIPImageProcessor(**{**usual, **changes})) is None
