"""Where an image's patches lie in the image that was sent: the image processor's steps, undone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from serving.errors import BadRequestError
from serving.protocol import Explanation

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What a checkpoint does to an image before it is cut into patches.

    Attributes:
        is_padded: a square is made of it first, the image in the middle.
        shortest_edge: its shorter side becomes this, in pixels; None where both sides are given.
        size: width and height it becomes; None where the shorter side is given, or as it is.
        crop: width and height of what is taken from its middle; None for all of it.
    """

    is_padded: bool = False
    shortest_edge: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    def box(self, width: int, height: int) -> Box:
        """The processed image's edges in the pixels of an image of this size."""
        side_x, side_y = (max(width, height),) * 2 if self.is_padded else (width, height)
        pad_x, pad_y = (side_x - width) // 2, (side_y - height) // 2
        new_x, new_y = self._resized(side_x, side_y)
        crop_x, crop_y = self.crop or (new_x, new_y)
        left, top = _start(new_x, crop_x), _start(new_y, crop_y)
        unit_x, unit_y = side_x / new_x, side_y / new_y
        return (
            left * unit_x - pad_x,
            top * unit_y - pad_y,
            (left + crop_x) * unit_x - pad_x,
            (top + crop_y) * unit_y - pad_y,
        )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.size or (width, height)
        longer = int(self.shortest_edge * max(width, height) / min(width, height))
        return (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)


def _start(length: int, crop: int) -> int:
    """Where a crop from the middle begins; negative where black bars are added instead."""
    return int((length - crop) / 2) if crop <= length else -((crop - length) // 2)


def read_processing(settings: Mapping[str, Any]) -> Processing:
    """From a Hugging Face image processor's settings.

    Raises:
        BadRequestError: it resizes in a way that is not undone here.
    """
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    is_resized = settings.get("do_resize", True)
    if is_resized and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise BadRequestError(
            f"explain=true: this checkpoint's image processor resizes by {dict(size)}; understood "
            "are shortest_edge, or height and width; send the request without explain",
            param="explain",
        )
    fixed = is_resized and "height" in size
    return Processing(
        is_padded=bool(settings.get("do_pad")),
        shortest_edge=size.get("shortest_edge") if is_resized else None,
        size=(size["width"], size["height"]) if fixed else None,
        crop=(crop["width"], crop["height"]) if settings.get("do_center_crop", True) else None,
    )


_SENT_SIZE = "sieve_sent_size"


def with_sent_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Notes on an image that was fitted how large it was when it was sent.

    It travels with the image, also pickled to a Ray replica.
    """
    image.info[_SENT_SIZE] = size
    return image


def sent_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image as it was sent."""
    size: tuple[int, int] = image.info.get(_SENT_SIZE, image.size)
    return size


def explained(
    found: Sequence[Mapping[str, list[Any]]],
    images: Sequence[Image.Image],
    settings: Mapping[str, Any],
    patch_size: int,
    pixels: Sequence[int],
) -> list[Explanation]:
    """What the worker found, placed in the images.

    Args:
        found: of `patches.worker`, an image each.
        images: as they were given, or fitted and with their sent size.
        settings: of the checkpoint's image processor.
        patch_size: side of a patch in processed pixels.
        pixels: shape of the processed images, `(N, 3, H, W)`.

    Raises:
        BadRequestError: see `read_processing`.
    """
    processing = read_processing(settings)
    high, wide = pixels[-2:]
    rows, columns = high // patch_size, wide // patch_size
    # The tower leaves out what is less than a patch at the right and at the bottom.
    share_x, share_y = columns * patch_size / wide, rows * patch_size / high
    return [
        Explanation(
            grid=(rows, columns),
            box=_cut(processing.box(*sent_size(image)), share_x, share_y),
            **one,
        )
        for one, image in zip(found, images, strict=True)
    ]


def _cut(box: Box, share_x: float, share_y: float) -> Box:
    left, top, right, bottom = box
    cut = (left, top, left + share_x * (right - left), top + share_y * (bottom - top))
    assert all(map(math.isfinite, cut)), box
    return cut
