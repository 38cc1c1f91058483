"""Image files that a server must survive: hostile, broken, and odd ones that are right."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from bench.pictures import picture

SIZE = (120, 80)
_PNG = b"\x89PNG\r\n\x1a\n"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
Make = Callable[[], bytes]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """A picture as a file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def small(form: str, seed: int = 0) -> bytes:
    """A small valid file of a format."""
    return encoded(picture(seed, 0, SIZE), form)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of a claimed size, with whatever chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return _PNG + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def png_with(*chunks: bytes) -> bytes:
    """A small valid PNG with chunks added after its header."""
    whole = small("PNG")
    after_header = len(_PNG) + 25
    return whole[:after_header] + b"".join(chunks) + whole[after_header:]


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    raw = bytearray(small("JPEG"))
    start = raw.index(b"\xff\xc0")
    raw[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


def jpeg_of_many_scans(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; each is decoded in full."""
    raw = encoded(picture(0, 0, (1024, 1024)), "JPEG", progressive=True, quality=30)
    last = raw.rindex(b"\xff\xda")
    scan = raw[last:-2]
    return raw[:last] + scan * num_scans + raw[-2:]


def gif_of_many_frames(num_frames: int) -> bytes:
    """A GIF whose one frame comes again and again."""
    raw = encoded(Image.new("L", (8, 8)), "GIF")
    start = raw.index(b"\x2c")
    return raw[:start] + raw[start:-1] * num_frames + raw[-1:]


def _zeros(num_mb: int) -> bytes:
    return zlib.compress(b"\0" * (num_mb << 20), 9)


def _exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(0, 0, SIZE), "JPEG", exif=exif)


def _palette_with_alpha() -> bytes:
    return encoded(picture(0, 0, SIZE).convert("P"), "PNG", transparency=bytes(range(256)))


def _sixteen_bits() -> bytes:
    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])
    return encoded(Image.fromarray(grey), "PNG")


def _frames(form: str) -> bytes:
    return encoded(
        picture(0, 0, SIZE), form, save_all=True, append_images=[picture(0, 1, SIZE)] * 3
    )


def _cut(form: str) -> bytes:
    whole = small(form)
    return whole[: len(whole) * 2 // 3]


BROKEN: Mapping[str, Make] = {
    "empty": lambda: b"",
    "one-byte": lambda: b"\x89",
    "html": lambda: b"<html><body>not here</body></html>",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "tiff": lambda: small("TIFF"),
    "icon": lambda: encoded(picture(0, 0, (32, 32)), "ICO"),
    "jpeg-2000-box": lambda: b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0" * 64,
    "zip": lambda: b"PK\x03\x04" + b"\0" * 64,
    "png-50000x50000": lambda: png(50_000, 50_000, chunk(b"IDAT", b"")),
    "png-just-over-the-pixels": lambda: png(4_001, 4_001, chunk(b"IDAT", b"")),
    "png-no-pixels": lambda: png(0, 9, chunk(b"IDAT", b"")),
    "png-negative": lambda: png(2**31, 2**31, chunk(b"IDAT", b"")),
    "png-header-only": lambda: png(64, 64),
    "png-bad-checksum": lambda: small("PNG").replace(b"IDAT", b"IDAX", 1),
    "gif-65535x65535": lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0" * 20,
    "bmp-huge": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 64, 0, 0, 54, 40, 2**30, 2**30, 1, 24,
                            0, 0, 0, 0, 0, 0)
    ),
    "webp-16383x16383": lambda: (
        b"RIFF\x1e\x00\x00\x00WEBPVP8X\n\x00\x00\x00\x00\x00\x00\x00\xfe\x3f\x00\xfe\x3f\x00"
    ),
    "jpeg-65500x65500": lambda: jpeg_claiming(65_500, 65_500),
    "sliver-1x4000": lambda: encoded(Image.new("RGB", (1, 4000)), "PNG"),
    "text-bomb": lambda: png_with(chunk(b"zTXt", b"a\0\0" + _zeros(200))),
    **{f"cut-{form.lower()}": functools.partial(_cut, form) for form in FORMATS},
}  # fmt: skip
"""Must be a 400."""

ODD: Mapping[str, Make] = {
    "cmyk": lambda: encoded(picture(0, 0, SIZE).convert("CMYK"), "JPEG"),
    "grey-jpeg": lambda: encoded(picture(0, 0, SIZE).convert("L"), "JPEG"),
    "progressive-jpeg": lambda: encoded(picture(0, 0, SIZE), "JPEG", progressive=True),
    "sixteen-bits": _sixteen_bits,
    "one-bit": lambda: encoded(picture(0, 0, SIZE).convert("1"), "PNG"),
    "one-bit-bmp": lambda: encoded(picture(0, 0, SIZE).convert("1"), "BMP"),
    "palette-with-alpha": _palette_with_alpha,
    "grey-with-alpha": lambda: encoded(picture(0, 0, SIZE).convert("LA"), "PNG"),
    "transparent": lambda: encoded(Image.new("RGBA", SIZE, (0, 0, 0, 0)), "PNG"),
    "animated-gif": lambda: _frames("GIF"),
    "animated-webp": lambda: _frames("WEBP"),
    "animated-png": lambda: _frames("PNG"),
    "exif-turned": _exif_turned,
    "1x1": lambda: encoded(Image.new("RGB", (1, 1)), "PNG"),
    "20x4000": lambda: encoded(Image.new("RGB", (20, 4000)), "PNG"),
    "4000x4000": lambda: encoded(Image.new("RGB", (4000, 4000)), "PNG"),
    "profile-bomb": lambda: png_with(chunk(b"iCCP", b"a\0\0" + _zeros(200))),
    "ten-thousand-frames": lambda: gif_of_many_frames(10_000),
    "thousand-scans": lambda: jpeg_of_many_scans(1_000),
    "long-comment": lambda: png_with(chunk(b"tEXt", b"a\0" + b"x" * 900_000)),
    "trailing-bytes": lambda: small("PNG") + b"x" * 100_000,
    "wrong-name": lambda: small("GIF"),  # sent as image/png, like all of these
}
"""A correct 200 or a clear 400."""
