"""MVSA-Single and MVSA-Multiple in their published layout (Niu et al., 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.errors import ConfigError
from serving.posts.post import IMAGE_SUFFIXES, Post
from serving.posts.reader import Posts, Reading
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

    def __init__(self, source: Path, reading: Reading) -> None:
        super().__init__(source, reading)
        if not (source / "data").is_dir():
            raise ConfigError(
                f"data={source.name!r} has {MVSA_LABELS} but no folder data/ of ID.jpg, ID.txt",
                param="data",
            )
        rows = dict(_read_labels(source / MVSA_LABELS))
        if reading.chosen is not None:
            agreed = [id_ for id_, labels in rows.items() if labels is not None]
            reading.chosen.check_all_in(agreed, _place(len(rows) - len(agreed)))
            rows = {id_: labels for id_, labels in rows.items() if id_ in reading.chosen}
        self._rows = {id_: labels for id_, labels in rows.items() if labels is not None}
        self.num_left_out = len(rows) - len(self._rows)
        self.num_posts = len(self._rows)

    @staticmethod
    def matches(source: Path) -> bool:
        """Whether the source has this layout."""
        return (source / MVSA_LABELS).is_file()

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


def _place(num_left_out: int) -> str:
    if not num_left_out:
        return MVSA_LABELS
    return f"{MVSA_LABELS} (where {num_left_out} are left out, as the annotators all differ)"


def _read_labels(path: Path) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Labels by id of `ID<tab>text,image...` lines under a header, None where none is agreed."""
    num_cells, seen = 0, set()
    for number, line in numbered_lines(path):
        cells = [cell.strip() for cell in re.split("[\t,]", line)]
        where = f"{path.name} line {number}: {line[:80]!r}"
        if number == 1:
            num_cells = len(cells)
            pairs = (num_cells - 1) // 2
            known = num_cells in _NUM_ANNOTATORS
            if not known or [cell.lower() for cell in cells] != ["id", *_PAIR * pairs]:
                raise ConfigError(
                    f"{where}, expected the header 'ID<tab>text,image' (MVSA-Single), or one with "
                    "three times '<tab>text,image' (MVSA-Multiple)"
                )
            continue
        if not num_cells:
            raise ConfigError(f"{where}, expected the header in line 1")
        if len(cells) != num_cells or not cells[0] or not {*cells[1:]} <= {*SENTIMENTS}:
            expected = "ID" + "<tab>text,image" * ((num_cells - 1) // 2)
            raise ConfigError(f"{where}, expected {expected!r} with labels {', '.join(SENTIMENTS)}")
        if cells[0] in seen:
            raise ConfigError(f"{where}: id={cells[0]!r} is there twice; ids must be unique")
        seen.add(cells[0])
        yield cells[0], _labels(text=majority(cells[1::2]), image=majority(cells[2::2]))


def _labels(*, image: str | None, text: str | None) -> dict[str, str] | None:
    if image is None or text is None:
        return None
    own = {"image": image, "text": text}
    try:
        merged = merge_labels(image, text)
    except ValueError:
        return own
    return {**own, "multimodal": merged, "sentiment": merged}
