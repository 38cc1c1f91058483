"""`python -m train data`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from tqdm import tqdm

from serving.errors import ConfigError
from serving.images import ImageLimits
from serving.posts import Post, Posts, find_layout, known_splits, read_posts
from serving.structures import STRUCTURES, LabelStructure, find_structure

if TYPE_CHECKING:
    from train.splits import Split
    from train.survey import Look, Survey

DESCRIPTION = """\
Look at a data set: how many posts, labels, lengths, encodings, and what is wrong with it. Nothing
that is missing, empty or broken is dropped; it is counted, and the first are named.

With --split, only those posts; several splits are also compared: how many posts of one have a
text or an image, byte by byte, that another one has too.

With --make, draws a split: `stratified` into train, dev and test (8:1:1 of each label), or
`folds`, each post in dev once. --out writes the lists of ids, which --split then takes:
  OUT/train_ids.txt, dev_ids.txt, test_ids.txt       or       OUT/fold-0/train_ids.txt, ...

examples:
  python -m train data --data MVSA_Single --split train,dev --structure llavac
  python -m train data --data MVSA_Single --make stratified --field multimodal --out splits
  python -m train data --data posts.csv --fields text=tweet,image=photo,labels.sentiment=y --check
"""


class Flags(BaseModel):
    """Flags of `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    split: tuple[str, ...]
    fields: Mapping[str, str]
    structure: str | None
    field: str | None
    make: Literal["stratified", "folds"] | None
    folds: int = Field(ge=2, le=1000)
    seed: int = Field(ge=0)
    out: Path | None
    check: bool
    json_: bool = Field(alias="json")

    @field_validator("split", mode="before")
    @classmethod
    def _names(cls, value: str | None) -> tuple[str, ...]:
        return tuple(value.split(",")) if value else ()

    @field_validator("fields", mode="before")
    @classmethod
    def _pairs(cls, value: str | None) -> dict[str, str]:
        return parse_fields(value) if value else {}

    @property
    def label_structure(self) -> LabelStructure | None:
        """The structure of that name."""
        return None if self.structure is None else find_structure(STRUCTURES, self.structure)

    @property
    def label_field(self) -> str | None:
        """The field that counts: the given one, or the structure's last."""
        structure = self.label_structure
        return self.field or (list(structure.fields)[-1] if structure else None)

    @property
    def limits(self) -> ImageLimits | None:
        """What images are decoded under, if they are."""
        return ImageLimits() if self.check else None


def parse_fields(text: str) -> dict[str, str]:
    """Our names of fields to the file's, from `text=tweet,labels.sentiment=y`.

    Raises:
        ValueError: it is not spelled so, or names a field twice.
    """
    fields: dict[str, str] = {}
    for pair in text.split(","):
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if not ours or not theirs or ours in fields:
            raise ValueError("expected OURS=THEIRS pairs by commas, each of ours once")
        fields[ours] = theirs
    return fields


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder or a file of posts")
    add("--split", help="names or files of splits, by commas (default: all posts)")
    add("--fields", help="what the file calls our fields: text=tweet,image=photo,labels.x=y")
    add("--structure", help=f"check labels against one of {', '.join(STRUCTURES)}")
    add("--field", help="the label that counts (default: all, or the structure's last)")
    add("--make", choices=("stratified", "folds"), help="draw a split")
    add("--folds", type=int, default=5, help="how many, for --make folds (default: 5)")
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add("--out", type=Path, help="folder for the ID lists of --make")
    add("--check", action="store_true", help="decode every image, as the server would")
    add("--json", action="store_true", help="print JSON instead of text")


def run(given: Namespace) -> int:
    """Looks at the posts, makes splits of them, and prints what there is."""
    values = {name: value for name, value in vars(given).items() if name != "run"}
    flags = Flags.model_validate(values)
    if flags.out is not None and flags.make is None:
        raise ConfigError("--out is for --make, which is not given", param="out")
    _print_made(flags) if flags.make else _print_read(flags)
    return 0


def _read(flags: Flags, split: str | None) -> Posts:
    return read_posts(flags.data, split=split, fields=flags.fields, structure=flags.label_structure)


def _print_read(flags: Flags) -> None:
    """The posts as they are, or some splits of them."""
    from train.survey import leaks, render_survey

    surveys = [_survey(flags, split) for split in flags.split or (None,)]
    found = list(leaks(surveys))
    if flags.json_:
        _print_json(
            flags,
            parts=[part.as_dict() for part in surveys],
            leaks=[asdict(leak) for leak in found],
        )
        return
    print(f"{flags.data.name}: {find_layout(flags.data).description}")
    print(f"splits: {', '.join(known_splits(flags.data)) or 'none'}\n")
    print("\n".join(map(render_survey, surveys)))
    _print_labels(flags, surveys)
    _print_leaks(found)


def _survey(flags: Flags, split: str | None) -> Survey:
    from train.survey import Survey

    posts = _read(flags, split)
    survey = Survey(Path(split).name.removesuffix("_ids.txt") if split else "all")
    for look in _looks(flags, posts):
        survey.add(look)
    survey.num_not_utf8, survey.num_left_out = posts.num_not_utf8, posts.num_left_out
    return survey


def _looks(flags: Flags, posts: Posts) -> Iterable[Look]:
    """Every post looked at, with a bar on the terminal, if there is one."""
    from train.survey import look_at

    for post in _with_bar(posts):
        yield look_at(post, structure=flags.label_structure, limits=flags.limits)


def _with_bar(posts: Posts) -> Iterable[Post]:
    hidden = not sys.stderr.isatty()
    return tqdm(posts, total=posts.num_posts, unit="post", file=sys.stderr, disable=hidden)


def _print_made(flags: Flags) -> None:
    """Draws splits, shows them, and writes them where that is asked for."""
    from train.survey import leaks

    splits = _make(flags)
    surveys, num_unlabelled = _survey_parts(flags, splits)
    found = [list(leaks(parts)) for parts in surveys]
    written = [str(path) for path in _write(flags, splits)]
    made = list(zip(splits, surveys, found, strict=True))
    if flags.json_:
        shown = [
            {
                "name": split.name,
                "parts": [part.as_dict() for part in parts],
                "leaks": [asdict(leak) for leak in between],
            }
            for split, parts, between in made
        ]
        _print_json(
            flags, seed=flags.seed, num_unlabelled=num_unlabelled, splits=shown, written=written
        )
        return
    for split, parts, between in made:
        print(f"{split.name}, seed {flags.seed}")
        _print_labels(flags, parts)
        _print_leaks(between)
    if num_unlabelled:
        print(f"left out: {num_unlabelled} posts without a label of {flags.label_field}")
    if written:
        print(f"written: {', '.join(written)}")


def _write(flags: Flags, splits: Sequence[Split]) -> list[Path]:
    if flags.out is None:
        return []
    if flags.make == "stratified":
        return splits[0].write(flags.out)
    return [path for split in splits for path in split.write(flags.out / split.name)]


def _make(flags: Flags) -> Sequence[Split]:
    from train.splits import k_folds, stratified

    if len(flags.split) > 1:
        raise ConfigError(f"--make splits one set of posts, --split names {len(flags.split)}")
    if flags.label_field is None:
        raise ConfigError("--make needs --field, the label to spread evenly, or --structure")
    posts = _read(flags, flags.split[0] if flags.split else None)
    if flags.make == "stratified":
        return [stratified(_with_bar(posts), flags.label_field, seed=flags.seed)]
    return k_folds(_with_bar(posts), flags.label_field, k=flags.folds, seed=flags.seed)


def _survey_parts(flags: Flags, splits: Sequence[Split]) -> tuple[list[list[Survey]], int]:
    """A survey of each part of each split, and how many posts are in none, in one reading."""
    from train.survey import Survey

    surveys = [{part: Survey(part) for part in split.parts} for split in splits]
    places: list[dict[str, Survey]] = [
        {id_: parts[part] for part, ids in split.parts.items() for id_ in ids}
        for split, parts in zip(splits, surveys, strict=True)
    ]
    num_unlabelled = 0
    for look in _looks(flags, _read(flags, flags.split[0] if flags.split else None)):
        num_unlabelled += look.post.id not in places[0]
        for place in places:
            if look.post.id in place:
                place[look.post.id].add(look)
    return [list(parts.values()) for parts in surveys], num_unlabelled


def _print_labels(flags: Flags, surveys: Sequence[Survey]) -> None:
    from train.survey import render_labels

    there = list(dict.fromkeys(field for survey in surveys for field in survey.labels))
    if flags.field is not None and flags.field not in there:
        raise ConfigError(
            f"--field {flags.field!r}: no post has a label of it; fields there are {there}"
        )
    structure = flags.label_structure
    shown = [flags.field] if flags.field else list(structure.fields) if structure else there
    for field in shown:
        print(f"\n{render_labels(surveys, field)}")


def _print_leaks(found: Iterable[Any]) -> None:
    lines = [
        f"{leak.part} in {leak.known}: {leak.ids} ids, {leak.texts} texts, {leak.images} images"
        for leak in found
    ]
    print("\n" + "\n".join(["the same in two parts:", *lines]) + "\n" if lines else "")


def _print_json(flags: Flags, **values: object) -> None:
    print(json.dumps({"data": flags.data.name, **values}, indent=2, ensure_ascii=False))
