"""Images of synthetic posts: one face among distractors and clutter, in a random look.

Only the mouth tells the label: it smiles, is straight or frowns. Discs without a mouth and
mouths without a face lie around it. Test images use looks that training never shows: face
colours, face sizes, backgrounds and shapes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from train.demo.checkpoint import GRID, IMAGE_SIZE, PATCH_SIZE

Color = tuple[int, int, int]
Canvas = ImageDraw.ImageDraw
Random = np.random.Generator
SCALE = 2  # drawn larger, then averaged down: smooth edges
MIN_SIGNAL_SHARE = 0.25  # of a patch that the face must cover


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What images of a split may look like.

    Attributes:
        hues: ranges of face hues, in [0, 1).
        sizes: face diameters in pixels.
        backgrounds: names in `BACKGROUNDS`.
        shapes: names in `SHAPES`.
    """

    hues: tuple[tuple[float, float], ...]
    sizes: tuple[int, ...]
    backgrounds: tuple[str, ...]
    shapes: tuple[str, ...]


LOOKS: dict[Literal["train", "test"], Looks] = {
    "train": Looks(
        hues=((0.0, 0.2), (0.4, 0.6), (0.8, 0.9)),
        sizes=(24, 26, 28, 30, 32),
        backgrounds=("plain", "gradient", "stripes", "mosaic"),
        shapes=("disc", "square", "mouth", "scribble", "triangle", "bars", "frame"),
    ),
    "test": Looks(
        hues=((0.22, 0.38), (0.62, 0.78)),
        sizes=(25, 27, 29, 31),
        backgrounds=("checker", "blobs"),
        shapes=("disc", "mouth", "ring", "cross", "arrow"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and where its signal is.

    Attributes:
        pixels: `(112, 112, 3)` uint8.
        mask: `(64,)` bool, patches in raster order that the face covers.
        box: left, top and diameter of the face, in pixels.
    """

    pixels: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int]


def draw_picture(label: str, looks: Looks, rng: Random) -> Picture:
    """A random picture whose face shows `label`."""
    side = IMAGE_SIZE * SCALE
    image = Image.new("RGB", (side, side), _any_color(rng))
    canvas = ImageDraw.Draw(image)
    BACKGROUNDS[str(rng.choice(looks.backgrounds))](canvas, rng)
    for _ in range(rng.integers(5, 11)):
        x, y, size = _place(rng, int(rng.integers(8, 26)))
        SHAPES[str(rng.choice(looks.shapes))](canvas, x, y, size, rng)
    diameter = int(rng.choice(looks.sizes))
    left, top = (int(v) for v in rng.integers(0, IMAGE_SIZE - diameter + 1, size=2))
    _draw_face(canvas, label, (left, top, diameter), looks, rng)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32) + rng.normal(0, 4, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return Picture(
        pixels=pixels.clip(0, 255).astype(np.uint8),
        mask=signal_mask(left, top, diameter),
        box=(left, top, diameter),
    )


def signal_mask(left: int, top: int, diameter: int) -> np.ndarray:
    """Patches of which the disc covers at least a quarter, `(64,)` bool."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    radius = diameter / 2
    inside = np.hypot(rows - top - radius, columns - left - radius) <= radius
    patches = inside.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean(axis=(1, 3))
    return (patches >= MIN_SIGNAL_SHARE).reshape(-1)


def _draw_face(
    canvas: Canvas,
    label: str,
    box: tuple[int, int, int],
    looks: Looks,
    rng: Random,
) -> None:
    left, top, size = (value * SCALE for value in box)
    low, high = looks.hues[rng.integers(len(looks.hues))]
    fill = _color(rng.uniform(low, high), rng.uniform(0.25, 0.7), rng.uniform(0.85, 1.0))
    ink = _color(rng.random(), 0.5, rng.uniform(0.0, 0.2))
    canvas.ellipse((left, top, left + size, top + size), fill=fill, outline=ink, width=SCALE)
    for centre in (0.32, 0.68):
        x, y, eye = left + centre * size, top + 0.36 * size, 0.07 * size
        canvas.ellipse((x - eye, y - eye, x + eye, y + eye), fill=ink)
    _draw_mouth(canvas, label, left, top, size, ink)


def _draw_mouth(
    canvas: Canvas, label: str, left: float, top: float, size: float, ink: Color
) -> None:
    width = max(2, round(0.09 * size))
    x0, x1 = left + 0.2 * size, left + 0.8 * size
    if label == "positive":
        canvas.arc((x0, top + 0.24 * size, x1, top + 0.84 * size), 15, 165, ink, width)
    elif label == "negative":
        canvas.arc((x0, top + 0.56 * size, x1, top + 1.16 * size), 195, 345, ink, width)
    else:
        canvas.line((x0, top + 0.69 * size, x1, top + 0.69 * size), ink, width)


def _place(rng: Random, size: int) -> tuple[float, float, float]:
    x, y = rng.uniform(0, IMAGE_SIZE - size, size=2) * SCALE
    return float(x), float(y), float(size * SCALE)


def _color(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _any_color(rng: Random) -> Color:
    return _color(rng.random(), rng.random(), rng.uniform(0.15, 1.0))


def _background_plain(canvas: Canvas, rng: Random) -> None:
    del canvas, rng  # the canvas has a colour already


def _background_gradient(canvas: Canvas, rng: Random) -> None:
    side = IMAGE_SIZE * SCALE
    first, last = np.array(_any_color(rng)), np.array(_any_color(rng))
    for row in range(0, side, 4):
        color = tuple(int(c) for c in first + (last - first) * row / side)
        canvas.rectangle((0, row, side, row + 4), fill=color)


def _background_stripes(canvas: Canvas, rng: Random) -> None:
    side, step, color = IMAGE_SIZE * SCALE, int(rng.integers(24, 60)), _any_color(rng)
    for offset in range(0, side, 2 * step):
        canvas.rectangle((offset, 0, offset + step, side), fill=color)


def _background_mosaic(canvas: Canvas, rng: Random) -> None:
    for _ in range(8):
        x, y, size = _place(rng, int(rng.integers(15, 70)))
        canvas.rectangle((x, y, x + size, y + rng.uniform(0.3, 1.5) * size), fill=_any_color(rng))


def _background_checker(canvas: Canvas, rng: Random) -> None:
    side, step, color = IMAGE_SIZE * SCALE, int(rng.integers(30, 60)), _any_color(rng)
    for row in range(0, side, step):
        for column in range((row // step % 2) * step, side, 2 * step):
            canvas.rectangle((column, row, column + step, row + step), fill=color)


def _background_blobs(canvas: Canvas, rng: Random) -> None:
    for _ in range(5):
        x, y, size = _place(rng, int(rng.integers(30, 80)))
        canvas.ellipse((x, y, x + size, y + size), fill=_any_color(rng))


def _shape_disc(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    canvas.ellipse((x, y, x + size, y + size), fill=_any_color(rng))


def _shape_square(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    canvas.rectangle((x, y, x + size, y + size), fill=_any_color(rng))


def _shape_triangle(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    canvas.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=_any_color(rng))


def _shape_mouth(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    label = str(rng.choice(("positive", "neutral", "negative")))
    _draw_mouth(canvas, label, x, y, size, _any_color(rng))


def _shape_scribble(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    points = [(x + a * size, y + b * size) for a, b in rng.random((5, 2))]
    canvas.line(points, fill=_any_color(rng), width=SCALE * int(rng.integers(1, 4)))


def _shape_frame(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    corners = [(x + a * size, y + b * size) for a, b in rng.random((4, 2))]
    canvas.polygon(corners, outline=_any_color(rng), width=SCALE * int(rng.integers(1, 4)))


def _shape_ring(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    canvas.ellipse((x, y, x + size, y + size), outline=_any_color(rng), width=2 * SCALE)


def _shape_cross(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    color = _any_color(rng)
    canvas.line((x, y, x + size, y + size), fill=color, width=2 * SCALE)
    canvas.line((x, y + size, x + size, y), fill=color, width=2 * SCALE)


def _shape_bars(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    color = _any_color(rng)
    for offset in (0.0, 0.4, 0.8):
        canvas.rectangle((x, y + offset * size, x + size, y + (offset + 0.15) * size), fill=color)


def _shape_arrow(canvas: Canvas, x: float, y: float, size: float, rng: Random) -> None:
    color, middle = _any_color(rng), y + size / 2
    canvas.line((x, middle, x + size, middle), fill=color, width=2 * SCALE)
    canvas.polygon([(x + size / 2, y), (x + size, middle), (x + size / 2, y + size)], fill=color)


BACKGROUNDS: dict[str, Callable[[Canvas, Random], None]] = {
    "plain": _background_plain,
    "gradient": _background_gradient,
    "stripes": _background_stripes,
    "mosaic": _background_mosaic,
    "checker": _background_checker,
    "blobs": _background_blobs,
}
SHAPES: dict[str, Callable[[Canvas, float, float, float, Random], None]] = {
    "disc": _shape_disc,
    "square": _shape_square,
    "triangle": _shape_triangle,
    "mouth": _shape_mouth,
    "scribble": _shape_scribble,
    "frame": _shape_frame,
    "ring": _shape_ring,
    "cross": _shape_cross,
    "bars": _shape_bars,
    "arrow": _shape_arrow,
}
