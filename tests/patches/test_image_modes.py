"""Crop or pad: the server's pixels are Hugging Face's, and those LLaVA-1.5's own code makes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from serving.manifest import read_image_mode
from tests.checkpoints import build_published_like
from tests.patches.test_processor import make_processor, process
from tests.pictures import noise

SIZES = [(336, 336), (337, 335), (640, 480), (480, 641), (50, 900), (31, 30)]


@pytest.fixture(scope="module")
def padding(tmp_path_factory):
    return build_published_like(tmp_path_factory.mktemp("padding") / "base", pad_to_square=True)


@pytest.fixture(params=["crop", "pad"])
def checkpoint(request, published, padding):
    folder = published if request.param == "crop" else padding
    assert read_image_mode(folder) == request.param
    return folder


def served_pixels(checkpoint, image):
    out = process(make_processor(checkpoint), [image])
    return out["mm_kwargs"]["image"][0]["pixel_values"].data.float()


@pytest.mark.parametrize("size", SIZES)
def test_the_servers_pixels_are_hugging_faces(checkpoint, size):
    image = noise(3, size)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(served_pixels(checkpoint, image), expected)


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_llavas_own_expand2square(padding, published, size):
    """`process_images` of LLaVA-1.5's code: bars of the mean colour, then as for any square."""
    image = noise(4, size)
    processor = AutoImageProcessor.from_pretrained(published)
    colour = tuple(int(255 * mean) for mean in processor.image_mean)
    side = max(size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = processor(images=[square], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(served_pixels(padding, image), expected)


def test_cropping_loses_the_ends_and_padding_does_not(padding, published):
    """A red end of a wide picture."""
    pixels = np.zeros((100, 400, 3), dtype=np.uint8)
    pixels[:, :80, 0] = 255
    image = Image.fromarray(pixels)
    reds = {
        mode: float(served_pixels(folder, image)[0].max())
        for mode, folder in (("crop", published), ("pad", padding))
    }
    assert reds["crop"] < -1.5  # black, normalised
    assert reds["pad"] > 1.5
