"""What is admitted as an image, and what is said about the rest."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.errors import BadRequestError
from serving.images import FORMATS, ImageDecoder, ImageLimits, decode_image, read_data_url
from tests.pictures import data_url, encoded, noise

LIMITS = ImageLimits(max_images=3, max_bytes=200_000, max_pixels=1_000_000)


@pytest.mark.parametrize("form", FORMATS)
def test_every_accepted_format_decodes_to_rgb(form):
    image = decode_image(encoded(noise(), form), LIMITS)
    assert (image.mode, image.size) == ("RGB", (120, 80))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    source = noise().convert("I").convert("I;16") if mode == "I;16" else noise().convert(mode)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    if mode == "PA":
        source = noise().convert("P")
        source.info["transparency"] = 3
    assert decode_image(encoded(source, form), LIMITS).mode == "RGB"


def test_sixteen_bits_keep_their_brightness():
    grey = np.full((20, 20), 40_000, dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(grey)), LIMITS)
    assert abs(np.asarray(image).mean() - 40_000 / 257) < 2


def test_transparent_pixels_are_white():
    assert decode_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), LIMITS).getpixel(
        (3, 3)
    ) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(), "JPEG", exif=exif), LIMITS).size == (80, 120)


def test_an_animation_is_its_first_frame():
    raw = encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)])
    assert np.array_equal(decode_image(raw, LIMITS), decode_image(encoded(noise(0), "GIF"), LIMITS))


def test_a_huge_png_is_refused_before_it_is_decoded():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(BadRequestError, match=r"pixels"):
        decode_image(raw, LIMITS)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encoded(noise(), "TIFF"),
        encoded(noise(), "JPEG")[:400],
        encoded(noise(), "PNG")[:-40],
        encoded(Image.new("RGB", (1, 4000))),
    ],
    ids=["empty", "html", "svg", "eps", "tiff", "cut-jpeg", "cut-png", "sliver"],
)
def test_what_is_no_usable_image_is_a_clear_400(raw):
    with pytest.raises(BadRequestError, match="image") as caught:
        decode_image(raw, LIMITS)
    assert caught.value.status == 400


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_files_decode_or_are_a_400(data):
    raw = bytearray(encoded(noise(), data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(raw[: data.draw(st.integers(1, len(raw)))]), LIMITS)
    except BadRequestError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/a.png", "'http'"),
        ("file:///etc/passwd", "'file'"),
        ("a.png", "no scheme"),
        ("data:image/png;base64", "not a base64 data URL"),
        ("data:image/png,abc", "not a base64 data URL"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
    ],
)
def test_urls_that_are_no_data_are_refused(url, message):
    with pytest.raises(BadRequestError, match=message):
        read_data_url(url, LIMITS, "image")


def test_line_breaks_in_base64_are_fine():
    url = data_url(noise())
    head, payload = url.split(",")
    broken = "\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    assert read_data_url(f"{head},{broken}", LIMITS, "image") == read_data_url(url, LIMITS, "image")


def test_too_many_bytes_are_refused_with_the_limit():
    url = data_url(io.BytesIO(b"x" * 200_001).getvalue())
    with pytest.raises(BadRequestError, match="200001 bytes, allowed are 200000"):
        read_data_url(url, LIMITS, "image")


async def test_the_decoder_keeps_order_and_names_the_bad_one():
    decoder = ImageDecoder(LIMITS)
    images = await decoder.decode([encoded(noise(0, (9, 9))), encoded(noise(0, (8, 9)))])
    assert [image.size for image in images] == [(9, 9), (8, 9)]
    with pytest.raises(BadRequestError, match=r"image\[1\]"):
        await decoder.decode([encoded(noise()), b"no"])
    with pytest.raises(BadRequestError, match="4 images, allowed are 3"):
        await decoder.decode([b""] * 4)
    decoder.close()
