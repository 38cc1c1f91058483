"""Posts of a data set for a training, by split, admitted and counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from serving.errors import ConfigError
from serving.posts import Post, read_posts
from serving.structures import STRUCTURES, LabelStructure, find_structure, load_structures
from train.admission import Admission
from train.fit import Material


def read_material(
    data: Path,
    structure: str,
    *,
    train: str | None = None,
    dev: str | None = None,
    structures: Path | None = None,
    fields: str | None = None,
    limit: int | None = None,
    skip_unlabelled: bool = False,
    skip_broken: bool = False,
) -> tuple[LabelStructure, Material]:
    """The structure and the posts to train and evaluate on.

    Raises:
        ConfigError: no such structure, data or split; a post that cannot be used; or a post that
            stands in both splits.
    """
    known = {**STRUCTURES, **(load_structures(structures) if structures else {})}
    found = find_structure(known, structure)
    admission = Admission(found, skip_unlabelled=skip_unlabelled, skip_broken=skip_broken)
    renamed = parse_fields(fields)

    def read(split: str | None) -> list[Post]:
        posts = read_posts(data, split=split, fields=renamed, structure=found)
        return admission.admit(islice(posts, limit))

    posts, held_out = read(train), read(dev) if dev is not None else []
    _check_apart(posts, held_out)
    source = {
        "source": data.name,
        "splits": {"train": _name(train), "dev": _name(dev)},
        "left_out": admission.skipped,
    }
    return found, Material(train=posts, dev=held_out, source=source)


def parse_fields(fields: str | None) -> dict[str, str] | None:
    """`text=tweet,image=photo` as a mapping from our name to the data's.

    Raises:
        ConfigError: it is something else.
    """
    if fields is None:
        return None
    pairs = [part.partition("=") for part in fields.split(",")]
    if any(not (ours and equals and theirs) for ours, equals, theirs in pairs):
        raise ConfigError(
            f"--fields {fields!r}: expected text=THEIR_NAME,image=THEIR_NAME,labels.FIELD=...",
            param="fields",
        )
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _check_apart(train: Sequence[Post], dev: Sequence[Post]) -> None:
    both = {post.id for post in train} & {post.id for post in dev}
    if both:
        raise ConfigError(
            f"{len(both)} posts are in both splits, among them {min(both)!r}; figures on posts "
            "that were trained on say nothing",
            param="dev_split",
        )


def _name(split: str | None) -> str | None:
    return Path(split).name.removesuffix("_ids.txt") if split else None
