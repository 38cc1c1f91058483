"""Posts and their readers: MVSA layout, a folder of image/text pairs, JSONL, CSV.

Readers yield; nothing is decoded here, an image stays a path or bytes until the server or the
trainer admits it. Texts of real data sets are not clean UTF-8: see `read_text`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serving.errors import BadRequestError, ConfigError
from serving.images import ImageLimits, read_data_url
from serving.structures import SENTIMENTS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MVSA_LABELS = "labelResultAll.txt"
_MVSA_HEADER = ["id", "text", "image"]


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
    text, is_odd = _decode(path.read_bytes())
    return text.strip(), is_odd


def _decode(raw: bytes) -> tuple[str, bool]:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding), encoding != "utf-8-sig"
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1"), True


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


def read_posts(source: Path, *, split: str | None = None) -> Posts:
    """Posts of a source in any of `LAYOUTS`, checked now as far as possible and read as asked for.

    Args:
        source: a folder or a file.
        split: only the posts named in `<split>_ids.txt` (MVSA layout).

    Raises:
        ConfigError: the source has none of the layouts, or something in it is wrong; the latter
            may also come while iterating, with the line at fault.
    """
    if not source.exists():
        raise ConfigError(f"data={str(source)!r} does not exist", param="data")
    for layout in LAYOUTS:
        if layout.matches(source):
            return layout(source, split)
    allowed = "; ".join(layout.description for layout in LAYOUTS)
    raise ConfigError(
        f"data={str(source)!r} has no layout that is known; allowed are: {allowed}", param="data"
    )


class Posts(ABC):
    """Posts of one source; every iteration reads it anew.

    Attributes:
        num_posts: how many there are, None where only reading tells.
        num_not_utf8: how many texts read in the last iteration were not UTF-8.
    """

    description: ClassVar[str]

    def __init__(self, source: Path, split: str | None) -> None:
        self.source = source
        self.num_posts: int | None = None
        self.num_not_utf8 = 0
        if split is not None:
            self._select(split)

    def __iter__(self) -> Iterator[Post]:
        self.num_not_utf8 = 0
        return self._read()

    @staticmethod
    @abstractmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""

    @abstractmethod
    def _read(self) -> Iterator[Post]: ...

    def _select(self, split: str) -> None:
        raise ConfigError(
            f"split={split!r}: {self.source.name} has no splits, only the MVSA layout does; "
            "leave split out",
            param="split",
        )

    def _read_text(self, path: Path) -> str:
        try:
            text, is_odd = read_text(path)
        except OSError as error:
            raise ConfigError(f"text {path.name!r} cannot be read: {error.strerror}") from error
        self.num_not_utf8 += is_odd
        return text


class MvsaPosts(Posts):
    """MVSA-Single's layout (Niu et al., 2016): a table of labels, and `data/ID.jpg`, `data/ID.txt`.

    Labels are `image`, `text` and, merged from both, `multimodal` and `sentiment`; positive with
    negative has no merged label.
    """

    description = f"MVSA-Single, a folder with {MVSA_LABELS} and data/"

    def __init__(self, source: Path, split: str | None) -> None:
        self._rows = _read_mvsa_labels(source / MVSA_LABELS)
        super().__init__(source, split)
        self.num_posts = len(self._rows)

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return (source / MVSA_LABELS).is_file() and (source / "data").is_dir()

    def _read(self) -> Iterator[Post]:
        data = self.source / "data"
        for id_, labels in self._rows.items():
            text = data / f"{id_}.txt"
            paths = [data / f"{id_}{suffix}" for suffix in IMAGE_SUFFIXES]
            yield Post(
                id=id_,
                text=self._read_text(text) if text.exists() else "",
                images=(next((path for path in paths if path.exists()), paths[0]),),
                labels=labels,
            )

    def _select(self, split: str) -> None:
        path = self.source / f"{split}_ids.txt"
        if not path.is_file():
            splits = sorted(p.name.removesuffix("_ids.txt") for p in self.source.glob("*_ids.txt"))
            raise ConfigError(
                f"split={split!r}: no file {path.name}; splits there are {splits}", param="split"
            )
        chosen: set[str] = set()
        for number, id_ in _numbered_lines(path):
            if id_ not in self._rows or id_ in chosen:
                fault = "is there twice" if id_ in chosen else f"is not in {MVSA_LABELS}"
                raise ConfigError(f"{path.name} line {number}: id={id_!r} {fault}")
            chosen.add(id_)
        self._rows = {id_: labels for id_, labels in self._rows.items() if id_ in chosen}


def _read_mvsa_labels(path: Path) -> dict[str, dict[str, str]]:
    """Labels by id of `ID<tab>text,image` lines under a header."""
    rows: dict[str, dict[str, str]] = {}
    for number, line in _numbered_lines(path):
        cells = [cell.strip() for cell in re.split("[\t,]", line)]
        where = f"{path.name} line {number}: {line[:80]!r}"
        if number == 1:
            if [cell.lower() for cell in cells] != _MVSA_HEADER:
                raise ConfigError(f"{where}, expected the header 'ID<tab>text,image'")
            continue
        if len(cells) != 3 or not cells[0] or not {*cells[1:]} <= {*SENTIMENTS}:
            raise ConfigError(
                f"{where}, expected 'ID<tab>text,image' with labels {', '.join(SENTIMENTS)}"
            )
        if cells[0] in rows:
            raise ConfigError(f"{where}: id={cells[0]!r} is there twice; ids must be unique")
        rows[cells[0]] = _mvsa_labels(text=cells[1], image=cells[2])
    return rows


def _mvsa_labels(*, image: str, text: str) -> dict[str, str]:
    own = {"image": image, "text": text}
    try:
        merged = merge_labels(image, text)
    except ValueError:
        return own
    return {**own, "multimodal": merged, "sentiment": merged}


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text, _ = _decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


class FolderPosts(Posts):
    """Images and texts of one folder, paired by their names without suffix, in natural order."""

    description = f"a folder of pairs, images ({', '.join(IMAGE_SUFFIXES)}) and .txt of one name"

    def __init__(self, source: Path, split: str | None) -> None:
        super().__init__(source, split)
        self._pairs: dict[str, dict[str, Path]] = {}
        for path in source.iterdir():
            kind = _kind(path)
            if kind is None:
                continue
            pair = self._pairs.setdefault(path.stem, {})
            if kind in pair:
                raise ConfigError(
                    f"id={path.stem!r} is there twice: {pair[kind].name!r} and {path.name!r}; "
                    f"a post has one {kind} here, use JSONL for several"
                )
            pair[kind] = path
        self.num_posts = len(self._pairs)

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return source.is_dir() and any(_kind(path) for path in source.iterdir())

    def _read(self) -> Iterator[Post]:
        for stem in sorted(self._pairs, key=_natural):
            pair = self._pairs[stem]
            yield Post(
                id=stem,
                text=self._read_text(pair["text"]) if "text" in pair else "",
                images=(pair["image"],) if "image" in pair else (),
            )


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix not in (*IMAGE_SUFFIXES, ".txt"):
        return None
    return "text" if suffix == ".txt" else "image"


def _natural(name: str) -> list[str | int]:
    """Sorts 2 before 10: text and numbers alternate, so that like compares with like."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


class Row(BaseModel):
    """A post as JSONL and CSV spell it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | int | None = None
    text: str | None = None
    image: str | None = None
    images: list[str] | None = None
    labels: dict[str, str | None] | None = None

    @model_validator(mode="after")
    def _has_something(self) -> Row:
        if not self.model_fields_set & {"text", "image", "images"}:
            raise ValueError("a post needs text, image or images")
        if self.image and self.images:
            raise ValueError("image and images exclude each other")
        return self


class RowPosts(Posts):
    """Posts of a file with a post a row; image paths are relative to the file."""

    _is_odd = False
    """Whether a line of the row being read was not UTF-8."""

    def _read(self) -> Iterator[Post]:
        seen: set[str] = set()
        self._is_odd = False
        for number, values in self._rows():
            post = self._post(number, values)
            if post.id in seen:
                raise self._fault(number, f"id={post.id!r} is there twice; ids must be unique")
            seen.add(post.id)
            self.num_not_utf8 += self._is_odd
            self._is_odd = False
            yield post

    @abstractmethod
    def _rows(self) -> Iterator[tuple[int, object]]:
        """Line number and values of each row."""

    def _lines(self) -> Iterator[str]:
        try:
            file = self.source.open("rb")
        except OSError as error:
            raise ConfigError(f"{self.source.name} cannot be read: {error.strerror}") from error
        with file:
            for raw in file:
                line, is_odd = _decode(raw)
                self._is_odd |= is_odd
                yield line

    def _post(self, number: int, values: object) -> Post:
        try:
            row = Row.model_validate(values)
        except ValidationError as error:
            raise self._fault(number, _explain(error)) from error
        images = row.images or ([row.image] if row.image else [])
        labels = row.labels or {}
        return Post(
            id=str(number if row.id is None else row.id),
            text=(row.text or "").strip(),
            images=tuple(self._image(number, image) for image in images),
            labels={field: label for field, label in labels.items() if label},
        )

    def _image(self, number: int, image: str) -> Path | bytes:
        if image.startswith("data:"):
            try:
                return read_data_url(image, ImageLimits(max_bytes=sys.maxsize), "image")
            except BadRequestError as error:
                raise self._fault(number, error.message) from error
        if not image or "://" in image:
            raise self._fault(
                number,
                f"image={image[:80]!r}; allowed are a path relative to {self.source.name} and a "
                "data URL (data:image/jpeg;base64,...)",
            )
        return self.source.parent / image

    def _fault(self, number: int, message: str) -> ConfigError:
        return ConfigError(f"{self.source.name} line {number}: {message}")


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{field!r} is unknown; allowed are {', '.join(Row.model_fields)}; remove or rename"
    if first["type"] == "model_type":
        return f"{first['input']!r:.80} is not an object"
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}={first['input']!r:.80}: {message}" if field else message


class JsonlPosts(RowPosts):
    """A JSON object a line; a post without id is called by its line number."""

    description = "a .jsonl file of objects with text, image or images, and id, labels if known"

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() in (".jsonl", ".ndjson")

    def _rows(self) -> Iterator[tuple[int, object]]:
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                yield number, self._mend(json.loads(line), line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise self._fault(
                    number, f"{line.strip()[:80]!r} is not a JSON object ({error})"
                ) from error

    def _mend(self, values: object, line: str) -> object:
        """Half emoji, as left by cutting texts in UTF-16, become question marks and are counted."""
        if r"\ud" not in line.lower():
            return values
        spelled = json.dumps(values, ensure_ascii=False)
        whole = spelled.encode(errors="replace").decode()
        self._is_odd |= whole != spelled
        return json.loads(whole)


class CsvPosts(RowPosts):
    """Columns id, text, image and labels.FIELD, by commas; an empty cell is a missing value."""

    description = (
        "a .csv file with a header of id, text, image, labels.FIELD (text or image needed)"
    )

    def __init__(self, source: Path, split: str | None) -> None:
        super().__init__(source, split)
        self._check_header(next(csv.reader(self._lines()), []))

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() == ".csv"

    def _check_header(self, header: list[str]) -> None:
        unknown = [
            name
            for name in header
            if name not in ("id", "text", "image") and not re.fullmatch(r"labels\.\w+", name)
        ]
        if unknown or len({*header}) < len(header) or not {"text", "image"} & {*header}:
            raise self._fault(
                1,
                f"columns {header!r:.200}; allowed are id, text, image and labels.FIELD, separated "
                "by commas, each once, with text or image among them",
            )

    def _rows(self) -> Iterator[tuple[int, object]]:
        reader = csv.reader(self._lines(), strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if header is None:
                    header, self._is_odd = cells, False
                elif cells:
                    yield reader.line_num, self._values(reader.line_num, header, cells)
        except csv.Error as error:
            raise self._fault(reader.line_num, f"is not CSV: {error}") from error

    def _values(self, number: int, header: list[str], cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(header):
            raise self._fault(number, f"{len(cells)} cells, the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        values: dict[str, Any] = {name: row[name] for name in ("text", "image") if name in row}
        labels = {name.removeprefix("labels."): row[name] for name in row if "." in name}
        return {**values, "id": row.get("id") or None, "labels": labels}


LAYOUTS: tuple[type[Posts], ...] = (MvsaPosts, FolderPosts, JsonlPosts, CsvPosts)
