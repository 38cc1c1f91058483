"""Fresh pictures: no cache of a server or engine has seen one before."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def picture(seed: int, index: int, size: tuple[int, int] = (336, 336)) -> Image.Image:
    """Blocks of random colours, the same for the same seed and index."""
    rng = np.random.default_rng((seed, index))
    blocks = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def picture_url(seed: int, index: int, size: tuple[int, int] = (336, 336)) -> str:
    """The same as a PNG data URL."""
    buffer = io.BytesIO()
    picture(seed, index, size).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def nudged(url: str, number: int) -> str:
    """A PNG data URL with two pixels of its first row changed by up to 15 of 255, others unchanged.

    The picture is another one for every cache and the same for every eye; two numbers below 2**24
    give two pictures.
    """
    head, encoded = url.split(",", 1)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    digits = np.array([number >> 4 * place & 15 for place in range(6)], np.uint8).reshape(2, 3)
    pixels[0, :2] = pixels[0, :2] & 0xF0 | digits
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return f"{head},{base64.b64encode(buffer.getvalue()).decode()}"


def photo_url(seed: int, index: int, size: tuple[int, int]) -> str:
    """The same as a JPEG data URL, as posts have them."""
    buffer = io.BytesIO()
    picture(seed, index, size).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
