"""Images for tests: noise of any size, encoded as clients send them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def noise(seed: int = 0, size: tuple[int, int] = (120, 80)) -> Image.Image:
    """Blocks of random colours: attention over them is far from uniform."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def data_url(image: Image.Image | bytes, form: str = "PNG") -> str:
    raw = image if isinstance(image, bytes) else encoded(image, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(raw).decode()}"
