"""The picture of an explanation: kept patches lit, the rest dimmed, or [CLS] attention as a map.

The page draws the same in a browser (`serving/page/picture.js`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from serving.schema import ImageExplanation

DIM = (12, 16, 24, 199)
PADDING = (202, 204, 207)
PAPER, INK, SOFT = (255, 255, 255), (28, 32, 39), (90, 95, 105)
# From dark violet over red to yellow: brighter is more, for every kind of colour vision.
RAMP = ((20, 11, 53), (101, 21, 110), (188, 55, 84), (242, 125, 46), (252, 236, 140))

Edges = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The part of the plane that a picture shows, and how large.

    Attributes:
        left: of what is shown, in pixels of the image that was sent; below 0 where bars are added.
        top: likewise.
        width: of what is shown, in the same pixels.
        height: likewise.
        scale: picture pixels to one of them.
    """

    left: float
    top: float
    width: float
    height: float
    scale: float

    @classmethod
    def around(cls, image: Image.Image, explanation: ImageExplanation, longest: int) -> Frame:
        """Shows the whole image and the whole grid."""
        left, top = min(0.0, explanation.box[0]), min(0.0, explanation.box[1])
        width = max(float(image.width), explanation.box[2]) - left
        height = max(float(image.height), explanation.box[3]) - top
        return cls(
            left=left, top=top, width=width, height=height, scale=longest / max(width, height)
        )

    @property
    def size(self) -> tuple[int, int]:
        """Of the picture, in pixels."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    def edges(self, left: float, top: float, right: float, bottom: float) -> Edges:
        """Where a box of the image lies in the picture."""
        xs = [round((x - self.left) * self.scale) for x in (left, right)]
        ys = [round((y - self.top) * self.scale) for y in (top, bottom)]
        return xs[0], ys[0], xs[1], ys[1]

    def patch(self, explanation: ImageExplanation, index: int) -> Edges:
        """Where a patch lies in the picture."""
        (rows, columns), (left, top, right, bottom) = explanation.grid, explanation.box
        row, column = divmod(index, columns)
        wide, high = (right - left) / columns, (bottom - top) / rows
        x, y = left + column * wide, top + row * high
        return self.edges(x, y, x + wide, y + high)


def draw_overlay(
    image: Image.Image,
    explanation: ImageExplanation,
    *,
    dims: bool = True,
    heat: float = 0.0,
    longest: int = 720,
) -> Image.Image:
    """The image with its explanation over it, RGB.

    Args:
        image: as it was sent, turned as EXIF says.
        explanation: of the server, for this image.
        dims: darkens what was not kept, what the checkpoint cropped off included.
        heat: how strong the map of [CLS] attention is, 0 to 1.
        longest: pixels of the longer side.
    """
    frame = Frame.around(image, explanation, longest)
    picture = Image.new("RGB", frame.size, PADDING)
    left, top, right, bottom = frame.edges(0, 0, image.width, image.height)
    size = (max(1, right - left), max(1, bottom - top))
    picture.paste(image.resize(size, Image.Resampling.LANCZOS), (left, top))
    if heat > 0:
        picture = Image.blend(picture, _heat_map(picture, explanation, frame), heat)
    if dims:
        picture = _dimmed(picture, explanation, frame)
    if _leaves_out(image, explanation):
        ImageDraw.Draw(picture).rectangle(_inside(frame.edges(*explanation.box)), None, PAPER, 2)
    return picture


def _leaves_out(image: Image.Image, explanation: ImageExplanation) -> bool:
    """Whether the checkpoint crops a part of the image off."""
    left, top, right, bottom = explanation.box
    return left > 1 or top > 1 or right < image.width - 1 or bottom < image.height - 1


def _dimmed(picture: Image.Image, explanation: ImageExplanation, frame: Frame) -> Image.Image:
    veil = Image.new("RGBA", picture.size, DIM)
    lit = ImageDraw.Draw(veil)
    for index in explanation.kept:
        lit.rectangle(_inside(frame.patch(explanation, index)), fill=(0, 0, 0, 0))
    return Image.alpha_composite(picture.convert("RGBA"), veil).convert("RGB")


def _heat_map(picture: Image.Image, explanation: ImageExplanation, frame: Frame) -> Image.Image:
    hot, most = picture.copy(), max(explanation.cls_attention)
    canvas = ImageDraw.Draw(hot)
    for index, score in enumerate(explanation.cls_attention):
        # Attention is a few high values over many low ones: the root shows both.
        color = heat_color(math.sqrt(score / most) if most > 0 else 0.0)
        canvas.rectangle(_inside(frame.patch(explanation, index)), fill=color)
    return hot


def heat_color(share: float) -> tuple[int, int, int]:
    """The colour of a share in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)
    )
    return red, green, blue


def _inside(edges: Edges) -> Edges:
    """Pillow draws the right and the bottom edge as well."""
    left, top, right, bottom = edges
    return left, top, max(left, right - 1), max(top, bottom - 1)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A picture of a contact sheet and the lines below it."""

    picture: Image.Image
    lines: Sequence[str]


def contact_sheet(tiles: Sequence[Tile], columns: int, *, side: int = 280) -> Image.Image:
    """Tiles row by row on paper, RGB; each picture at most `side` pixels a side."""
    assert tiles
    assert columns > 0
    gap, line, font = 20, 20, ImageFont.load_default(14)
    small = [_small(tile.picture, side) for tile in tiles]
    rows = [
        range(first, min(first + columns, len(tiles))) for first in range(0, len(tiles), columns)
    ]
    pictures = [max(small[index].height for index in row) for row in rows]
    texts = [8 + line * max(len(tiles[index].lines) for index in row) for row in rows]
    size = (gap + columns * (side + gap), gap + sum(pictures) + sum(texts) + gap * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    canvas, top = ImageDraw.Draw(sheet), gap
    for row, picture, text in zip(rows, pictures, texts, strict=True):
        for column, index in enumerate(row):
            x = gap + column * (side + gap)
            sheet.paste(small[index], (x, top))
            for number, words in enumerate(tiles[index].lines):
                place = (x, top + picture + 8 + number * line)
                canvas.text(place, _fitted(words, side, font), SOFT if number else INK, font)
        top += picture + text + gap
    return sheet


def _small(picture: Image.Image, side: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut where it is wider than its place; what the font cannot draw becomes '?'."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
