"""The layouts that are known, and reading a source that has one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from serving.errors import ConfigError
from serving.posts.folder import FolderPosts
from serving.posts.ids import Duplicates, IdList, list_path, listed_splits
from serving.posts.jsonl import JsonlPosts
from serving.posts.llava import LlavaPosts
from serving.posts.mvsa import MvsaPosts
from serving.posts.openai_lines import OpenAiPosts
from serving.posts.parquet import ParquetPosts
from serving.posts.places import Place, UrlPath, find_place
from serving.posts.reader import Posts, Reading
from serving.posts.table import CsvPosts
from serving.posts.twitter import TwitterPosts
from serving.structures import LabelStructure

# The first that matches is taken: a folder of pairs, and JSONL, is what no other layout is.
LAYOUTS: tuple[type[Posts], ...] = (
    MvsaPosts,
    TwitterPosts,
    FolderPosts,
    OpenAiPosts,
    JsonlPosts,
    CsvPosts,
    ParquetPosts,
    LlavaPosts,
)


def read_posts(
    source: Place | str,
    *,
    split: str | Place | None = None,
    fields: Mapping[str, str] | None = None,
    structure: LabelStructure | None = None,
    duplicates: Duplicates = "error",
) -> Posts:
    """Posts of a source in any of `LAYOUTS`, checked now as far as possible and read as asked for.

    Args:
        source: a folder or a file: a path, or a URL of whatever fsspec opens, which is read as a
            stream. Image paths in it are relative to it.
        split: only these posts: a name, for the ids of `<name>_ids.txt` in the folder or beside
            the file, or for a part that the data set is published in; or the path (or URL) of such
            a file.
        fields: what JSONL, CSV and Parquet of the user's own call our fields, such as
            `{"text": "tweet", "labels.sentiment": "y"}`.
        structure: parses the answers of conversations; other layouts name labels by field.
        duplicates: of posts with one id, refuse them ("error"), keep the first and count the
            others ("first"), or call the others `id#2`, `id#3`, ... ("rename"). Lists of a split
            name ids as they are after that.

    Raises:
        ConfigError: the source has none of the layouts, or something in it is wrong; the latter
            may also come while iterating, with the line at fault.
    """
    place = source if isinstance(source, UrlPath) else find_place(source)
    reading = Reading(fields=fields or {}, structure=structure, duplicates=duplicates)
    try:
        return _read(place, split, reading)
    except OSError as error:
        raise ConfigError(
            f"data={str(source)!r} cannot be read: {error.strerror or error}", param="data"
        ) from error


def _read(source: Place, split: str | Place | None, reading: Reading) -> Posts:
    if not source.exists():
        raise ConfigError(f"data={str(source)!r} does not exist", param="data")
    layout = find_layout(source)
    if reading.fields and not layout.has_own_names:
        raise ConfigError(
            f"fields={dict(reading.fields)!r:.80}: {source.name} is {layout.description}; only "
            "JSONL, CSV and Parquet may have names of their own, leave fields out",
            param="fields",
        )
    part = split if isinstance(split, str) and split in layout.parts(source) else None
    chosen = None if split is None or part is not None else _find_list(source, split)
    return layout(source, replace(reading, chosen=chosen, part=part))


def find_layout(source: Place) -> type[Posts]:
    """The layout of a source.

    Raises:
        ConfigError: it has none that is known.
    """
    for layout in LAYOUTS:
        if layout.matches(source):
            return layout
    allowed = "; ".join(layout.description for layout in LAYOUTS)
    raise ConfigError(
        f"data={str(source)!r} has no layout that is known; allowed are: {allowed}", param="data"
    )


def known_splits(source: Place) -> list[str]:
    """Names that `read_posts` takes as a split of the source."""
    parts = find_layout(source).parts(source)
    return parts + [name for name in listed_splits(_folder(source)) if name not in parts]


def _find_list(source: Place, split: str | Place) -> IdList:
    path = list_path(_folder(source), split)
    if not path.is_file():
        raise ConfigError(
            f"split={str(split)!r}: no file {path.name}; splits there are {known_splits(source)}, "
            "or give the path of a file with an id a line",
            param="split",
        )
    return IdList(path)


def _folder(source: Place) -> Place:
    return source if source.is_dir() else source.parent
