"""Posts and their readers: MVSA layout, a folder of image/text pairs, JSONL, CSV.

Readers yield; nothing is decoded here, an image stays a path or bytes until the server or the
trainer admits it. Texts of real data sets are not clean UTF-8: see `read_text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Post:
    """A text and images; either may be missing, images may be several.

    Attributes:
        id: unique within its source.
        text: the post's line of text, may be empty.
        images: paths to image files, or their encoded bytes.
        labels: known labels by field, e.g. `{"image": "positive", "text": "neutral"}`.
    """

    id: str
    text: str = ""
    images: tuple[Path | bytes, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def image_bytes(self) -> list[bytes]:
        """The encoded images; reads files only now."""
        return [item if isinstance(item, bytes) else item.read_bytes() for item in self.images]


def read_text(path: Path) -> tuple[str, bool]:
    """A text file's content, and whether it was not UTF-8.

    Tries utf-8, then cp1252, then latin-1 (which cannot fail): about a quarter of MVSA-Single's
    texts are not UTF-8.
    """
    raw = path.read_bytes()
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding).strip(), encoding != "utf-8"
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1").strip(), True


def merge_labels(image: str, text: str) -> str:
    """The multimodal label of an MVSA pair: the same, or the one that is not neutral.

    MVSA leaves pairs of positive and negative out (Niu et al., 2016).

    Raises:
        ValueError: one is positive and the other negative.
    """
    if image == text or text == "neutral":
        return image
    if image == "neutral":
        return text
    raise ValueError(f"no merged label for image={image!r}, text={text!r}")
