"""Images of a request: admitted by cheap checks, decoded off the event loop, one way for all.

The decoded image is what training sees for the same file: turned as EXIF says, first frame, RGB,
transparency over white.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageOps

from serving.errors import BadRequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MAX_ASPECT = 200


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is admitted: images a request, encoded bytes and pixels an image."""

    max_images: int = 4
    max_bytes: int = 10_000_000
    max_pixels: int = 16_000_000


def read_data_url(url: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes of a `data:image/...;base64,...` URL.

    Raises:
        BadRequestError: it is another kind of URL, not base64, or too long.
    """
    if not url.startswith("data:"):
        scheme = url.split(":", 1)[0][:16] if ":" in url[:32] else "no scheme"
        raise BadRequestError(
            f"{param} has {scheme!r} where only data URLs are accepted; send the image itself as "
            "data:image/jpeg;base64,...",
            param=param,
            code="image_url_not_allowed",
        )
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise BadRequestError(
            f"{param} is not a base64 data URL; expected data:image/jpeg;base64,...", param=param
        )
    return read_base64(payload, limits, param)


def read_base64(payload: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes of a base64 string (line breaks are ignored).

    Raises:
        BadRequestError: it is not base64, empty, or too long.
    """
    if len(payload) > limits.max_bytes * 1.4 + 1024:
        raise _too_many_bytes(len(payload) * 3 // 4, limits, param)
    try:
        raw = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"{param} is not valid base64: {error}", param=param) from error
    if len(raw) > limits.max_bytes:
        raise _too_many_bytes(len(raw), limits, param)
    return raw


def _too_many_bytes(size: int, limits: ImageLimits, param: str) -> BadRequestError:
    return BadRequestError(
        f"{param} has {size} bytes, allowed are {limits.max_bytes}; scale the image down "
        "(the model sees a few hundred pixels a side)",
        param=param,
        code="image_too_large",
    )


def decode_image(raw: bytes, limits: ImageLimits, param: str = "image") -> Image.Image:
    """A decoded RGB image.

    Raises:
        BadRequestError: not an image of an accepted format, broken, too many pixels, or a shape
            that cannot be resized sensibly.
    """
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRequestError(f"{param} has too many pixels: {error}", param=param) from error
    except Exception as error:  # Pillow's parsers raise many kinds on broken files
        raise BadRequestError(
            f"{param} ({len(raw)} bytes) is not a readable image; accepted are "
            f"{', '.join(FORMATS)}",
            param=param,
            code="invalid_image",
        ) from error
    _check_shape(image.size, limits, param)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except MemoryError as error:
        raise BadRequestError(
            f"{param} ({image.width}x{image.height}) needs more memory than is allowed; scale it "
            "down",
            param=param,
            code="invalid_image",
        ) from error
    except Exception as error:
        raise BadRequestError(
            f"{param} is a broken {image.format} file ({image.width}x{image.height}); send it "
            "complete",
            param=param,
            code="invalid_image",
        ) from error


def _check_shape(size: tuple[int, int], limits: ImageLimits, param: str) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadRequestError(
            f"{param} has {width}x{height} = {width * height} pixels, allowed are "
            f"{limits.max_pixels}; scale it down (the model sees a few hundred pixels a side)",
            param=param,
            code="image_too_large",
        )
    if max(size) > _MAX_ASPECT * min(size):
        raise BadRequestError(
            f"{param} is {width}x{height}: one side is over {_MAX_ASPECT} times the other",
            param=param,
            code="invalid_image",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        image = image.convert("F").point(lambda value: value / 257.0).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # that would be a copy


class Decoder(Protocol):
    """Decodes the images of requests: here in threads, in `serving.image_workers` in processes."""

    async def started(self) -> None:
        """Returns once it can decode."""

    async def decode(self, raws: Sequence[bytes], param: str = "image") -> list[Image.Image]:
        """All images of a request, in order.

        Raises:
            BadRequestError: too many, or one is not admitted; names which.
            OverloadedError: too many wait.
        """

    def close(self) -> None:
        """Ends what decodes."""


def image_names(raws: Sequence[bytes], limits: ImageLimits, param: str) -> list[str]:
    """What errors call each image of a request.

    Raises:
        BadRequestError: there are too many.
    """
    if len(raws) > limits.max_images:
        raise BadRequestError(
            f"{len(raws)} images, allowed are {limits.max_images} a request", param=param
        )
    return [param if len(raws) == 1 else f"{param}[{i}]" for i in range(len(raws))]


class ImageDecoder:
    """Decodes in a bounded pool of threads; Pillow's codecs release the interpreter lock.

    For images of one's own: a hostile one has the whole process, and no deadline.
    """

    def __init__(self, limits: ImageLimits, *, num_threads: int = 2) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="image")

    async def started(self) -> None:
        """Threads start when they are needed."""

    async def decode(self, raws: Sequence[bytes], param: str = "image") -> list[Image.Image]:
        """Decodes all images of a request, in order.

        Raises:
            BadRequestError: too many, or one is not admitted; names which.
        """
        names = image_names(raws, self.limits, param)
        loop = asyncio.get_running_loop()
        decoding = [
            loop.run_in_executor(self._pool, decode_image, raw, self.limits, name)
            for raw, name in zip(raws, names, strict=True)
        ]
        return list(await asyncio.gather(*decoding))

    def close(self) -> None:
        """Lets the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
