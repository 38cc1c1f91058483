"""MVSA-Single and MVSA-Multiple in their published layout (Niu et al., 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from serving.errors import ConfigError
from serving.posts.places import Place
from serving.posts.post import IMAGE_SUFFIXES, Post, Unreadable
from serving.posts.reader import Found, Posts, Reading, RowError
from serving.posts.texts import numbered_lines
from serving.structures import SENTIMENTS

MVSA_LABELS = "labelResultAll.txt"
_PAIR = ["text", "image"]
_NUM_ANNOTATORS = {3: "MVSA-Single", 7: "MVSA-Multiple"}
"""Cells of a row (an id, and a pair an annotator) to the data set that has them."""


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


def majority(labels: Sequence[str]) -> str | None:
    """What more than half of the annotators say, None where no label has that many."""
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


class MvsaPosts(Posts):
    """A table of labels by one or three annotators, and `data/ID.jpg`, `data/ID.txt`.

    Labels are `image`, `text` and, merged from both, `multimodal` and `sentiment`; positive with
    negative has no merged label. Of three annotators (MVSA-Multiple) the majority counts, for the
    text and for the image; a post where all three differ on one of them is left out and counted.
    """

    description = f"MVSA-Single or MVSA-Multiple, a folder with {MVSA_LABELS} and data/"

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        if not (source / "data").is_dir():
            raise ConfigError(
                f"data={source.name!r} has {MVSA_LABELS} but no folder data/ of ID.jpg, ID.txt",
                param="data",
            )
        rows = list(_read_rows(source / MVSA_LABELS))
        self._rows = [row for row in rows if row.is_agreed]
        num_left_out = len(rows) - len(self._rows)
        if reading.chosen is not None:
            reading.chosen.check_all_in({row.id for row in self._rows}, _place(num_left_out))
            num_left_out = sum(not row.is_agreed and row.id in reading.chosen for row in rows)
        else:
            self.num_posts = len(self._rows)
        self.num_left_out = num_left_out

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return (source / MVSA_LABELS).is_file()

    def _found(self) -> Iterator[Found]:
        names = {path.name for path in (self.source / "data").iterdir()}
        for row in self._rows:
            where = f"{MVSA_LABELS} line {row.number}"
            try:
                yield where, self._post(where, row, names)
            except RowError as error:
                yield where, self._unreadable(where, error, row.id or None)

    def _post(self, where: str, row: _Row, names: set[str]) -> Post | Unreadable:
        if row.error:
            raise row.error
        data = self.source / "data"
        text, images = f"{row.id}.txt", [f"{row.id}{suffix}" for suffix in IMAGE_SUFFIXES]
        image = next((name for name in images if name in names), images[0])
        post = Post(id=row.id, images=(data / image,), labels=row.labels or {})
        if text in names:
            return replace(post, text=self._read_text(data / text))
        message = self._said(where, f"text {text!r} is not there")
        return _Textless(id=row.id, message=message, post=post)

    def _post_of(self, entry: Post | Unreadable) -> Post:
        """A post without its text is not readable, and one by its image to who wants posts only."""
        if isinstance(entry, _Textless):
            return replace(entry.post, id=entry.id)
        return super()._post_of(entry)


@dataclass(frozen=True, kw_only=True)
class _Textless(Unreadable):
    """A post whose text is not there."""

    post: Post


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the table: labels, None where the annotators differ, or what is wrong with it."""

    number: int
    id: str
    labels: Mapping[str, str] | None = None
    error: RowError | None = None

    @property
    def is_agreed(self) -> bool:
        return self.labels is not None or self.error is not None


def _place(num_left_out: int) -> str:
    if not num_left_out:
        return MVSA_LABELS
    return f"{MVSA_LABELS} (where {num_left_out} are left out, as the annotators all differ)"


def _read_rows(path: Place) -> Iterator[_Row]:
    """Rows of `ID<tab>text,image...` lines under a header."""
    num_cells = 0
    for number, line in numbered_lines(path):
        cells = [cell.strip() for cell in re.split("[\t,]", line)]
        if number == 1:
            num_cells = len(cells)
            _check_header(path, line, cells)
        elif not num_cells:
            raise ConfigError(
                f"{path.name} line {number}: {line[:80]!r}, expected the header in line 1"
            )
        elif len(cells) != num_cells or not cells[0] or not {*cells[1:]} <= {*SENTIMENTS}:
            expected = "ID" + "<tab>text,image" * ((num_cells - 1) // 2)
            error = f"{line[:80]!r}, expected {expected!r} with labels {', '.join(SENTIMENTS)}"
            id_ = cells[0] if len(cells) > 1 else ""
            yield _Row(number=number, id=id_, error=RowError(error))
        else:
            labels = _labels(text=majority(cells[1::2]), image=majority(cells[2::2]))
            yield _Row(number=number, id=cells[0], labels=labels)


def _check_header(path: Place, line: str, cells: list[str]) -> None:
    pairs = (len(cells) - 1) // 2
    known = len(cells) in _NUM_ANNOTATORS
    if not known or [cell.lower() for cell in cells] != ["id", *_PAIR * pairs]:
        raise ConfigError(
            f"{path.name} line 1: {line[:80]!r}, expected the header 'ID<tab>text,image' "
            "(MVSA-Single), or one with three times '<tab>text,image' (MVSA-Multiple)"
        )


def _labels(*, image: str | None, text: str | None) -> dict[str, str] | None:
    if image is None or text is None:
        return None
    own = {"image": image, "text": text}
    try:
        merged = merge_labels(image, text)
    except ValueError:
        return own
    return {**own, "multimodal": merged, "sentiment": merged}
