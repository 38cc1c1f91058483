"""What a set of posts is made of: labels, lengths, faults, repeats, and leaks between parts.

Memory holds 8 bytes for an id, a text and an image each, so a million posts can be looked at: two
things count as the same when the 64 bits of their hash are (once in 10^7 for a million).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from serving.images import ImageLimits
from serving.posts import FAULTS, Fault, Post, check_post
from serving.structures import LabelStructure

_MAX_EXAMPLES = 5
_MAX_LABELS = 1000
_OTHER = "(other labels)"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a survey keeps of one post; hashes instead of contents."""

    post: Post
    faults: tuple[Fault, ...]
    id_hash: int
    text_hash: int | None
    image_hashes: tuple[int, ...]


def look_at(
    post: Post, *, structure: LabelStructure | None = None, limits: ImageLimits | None = None
) -> Look:
    """Reads a post's images and checks it; see `serving.posts.check_post` for the arguments."""
    checked = check_post(post, structure=structure, limits=limits)
    return Look(
        post=post,
        faults=checked.faults,
        id_hash=_hash(post.id.encode(errors="surrogatepass")),
        text_hash=_hash(post.text.encode(errors="surrogatepass")) if post.text else None,
        image_hashes=tuple(map(_hash, checked.images)),
    )


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


class Survey:
    """Counts over the posts of one part.

    Attributes:
        name: of the part.
        num_posts: how many were added.
        num_images: of all of them.
        num_not_utf8: texts that were not UTF-8; set by whoever read them, None if not known.
        num_left_out: posts that the data set's own rule leaves out; likewise.
        labels: posts by field and label.
        images_a_post: posts by how many images they have.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_posts = 0
        self.num_images = 0
        self.num_not_utf8: int | None = None
        self.num_left_out: int | None = None
        self.labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._lengths: Counter[int] = Counter()
        self.images_a_post: Counter[int] = Counter()
        self._faults: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self._hashes = {kind: array("Q") for kind in ("ids", "texts", "images")}

    def add(self, look: Look) -> None:
        """Counts one post."""
        post = look.post
        self.num_posts += 1
        self.num_images += len(post.images)
        self.images_a_post[len(post.images)] += 1
        self._lengths[len(post.text)] += 1
        for field, label in post.labels.items():
            counts = self.labels[field]
            counts[label if label in counts or len(counts) < _MAX_LABELS else _OTHER] += 1
        for fault in look.faults:
            self._faults[fault.kind] += 1
            if len(self._examples[fault.kind]) < _MAX_EXAMPLES:
                self._examples[fault.kind].append(f"{post.id} {fault.detail}".strip())
        self._hashes["ids"].append(look.id_hash)
        self._hashes["texts"].extend([] if look.text_hash is None else [look.text_hash])
        self._hashes["images"].extend(look.image_hashes)

    @property
    def faults(self) -> dict[str, dict[str, Any]]:
        """By kind, how many there are, and the first of them."""
        return {
            kind: {"count": self._faults[kind], "examples": self._examples[kind]}
            for kind in FAULTS
            if self._faults[kind]
        }

    @property
    def repeats(self) -> dict[str, int]:
        """How many texts and images are the same as an earlier one."""
        return {
            kind: len(self._hashes[kind]) - len(np.unique(self.hashes(kind)))
            for kind in ("texts", "images")
        }

    @property
    def characters(self) -> dict[str, float]:
        """Lengths of the texts."""
        if not self.num_posts:
            return {}
        ordered = np.repeat(*_columns(self._lengths))
        shares = {"min": 0, "median": 50, "p95": 95, "max": 100}
        values = np.percentile(ordered, list(shares.values()), method="lower")
        named = dict(zip(shares, map(float, values), strict=True))
        return {"mean": round(float(ordered.mean()), 1), **named}

    def hashes(self, kind: str) -> np.ndarray:
        """Hashes of its "ids", "texts" or "images", uint64."""
        return np.frombuffer(self._hashes[kind], dtype=np.uint64)

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "name": self.name,
            "num_posts": self.num_posts,
            "num_images": self.num_images,
            "images_a_post": {str(n): self.images_a_post[n] for n in sorted(self.images_a_post)},
            "num_not_utf8": self.num_not_utf8,
            "num_left_out": self.num_left_out,
            "labels": {field: dict(counts.most_common()) for field, counts in self.labels.items()},
            "characters": self.characters,
            "faults": self.faults,
            "repeats": self.repeats,
        }


def _columns(counts: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    keys = np.array(sorted(counts))
    return keys, np.array([counts[int(key)] for key in keys])


@dataclass(frozen=True, kw_only=True)
class Leak:
    """How much of one part is in another: what a model may know from training by heart.

    Attributes:
        known: the part whose contents are known, such as train.
        part: the part that is looked for in it, such as dev.
        ids: posts of `part` that are in `known` under the same id.
        texts: posts of `part` with a text that is in `known` too.
        images: images of `part` that are, byte by byte, in `known` too.
    """

    known: str
    part: str
    ids: int
    texts: int
    images: int

    @property
    def is_clean(self) -> bool:
        """Whether nothing leaks."""
        return not (self.ids or self.texts or self.images)


def leaks(surveys: Sequence[Survey]) -> Iterator[Leak]:
    """Between all pairs of parts, each looked for in those before it."""
    for known, part in combinations(surveys, 2):
        found = {
            kind: int(np.isin(part.hashes(kind), known.hashes(kind)).sum())
            for kind in ("ids", "texts", "images")
        }
        yield Leak(known=known.name, part=part.name, **found)


def render_labels(surveys: Sequence[Survey], field: str) -> str:
    """A table of one field's labels, a column a part, with the posts that have none."""
    totals: Counter[str] = Counter()
    for survey in surveys:
        totals.update(survey.labels[field])
    rows = [[field, *(survey.name for survey in surveys)]]
    for label, _ in totals.most_common(20):
        rows.append([label, *(str(survey.labels[field][label]) for survey in surveys)])
    hidden = [sum(survey.labels[field].values()) for survey in surveys]
    for row in rows[1:]:
        hidden = [rest - int(cell) for rest, cell in zip(hidden, row[1:], strict=True)]
    if any(hidden):
        rows.append([f"({len(totals) - 20} others)", *map(str, hidden)])
    without = [survey.num_posts - sum(survey.labels[field].values()) for survey in surveys]
    if any(without):
        rows.append(["(no label)", *map(str, without)])
    rows.append(["all", *(str(survey.num_posts) for survey in surveys)])
    return render_table(rows)


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def render_survey(survey: Survey) -> str:
    """Everything but the labels, a line each."""
    images = ", ".join(f"{count} with {n}" for n, count in sorted(survey.images_a_post.items()))
    lines = [f"{survey.name}: {survey.num_posts} posts, {survey.num_images} images ({images})"]
    lengths = ", ".join(f"{name} {value:g}" for name, value in survey.characters.items())
    lines.append(f"  characters a text: {lengths or 'none'}")
    if survey.num_not_utf8 is not None:
        lines.append(f"  texts that were not UTF-8, read as Windows-1252: {survey.num_not_utf8}")
    if survey.num_left_out:
        lines.append(f"  left out, as the annotators all differ: {survey.num_left_out}")
    repeats = survey.repeats
    lines.append(f"  repeated: {repeats['texts']} texts, {repeats['images']} images")
    for kind, fault in survey.faults.items():
        more = ", ..." if fault["count"] > len(fault["examples"]) else ""
        lines.append(f"  {FAULTS[kind]}: {fault['count']} ({', '.join(fault['examples'])}{more})")
    if not survey.faults:
        lines.append("  faults: none")
    return "\n".join(lines)
