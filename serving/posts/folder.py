"""A folder of images and texts that are paired by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from serving.errors import ConfigError
from serving.posts.ids import LIST_SUFFIX
from serving.posts.post import IMAGE_SUFFIXES, Post
from serving.posts.reader import Posts, Reading


class FolderPosts(Posts):
    """Images and texts of one folder, paired by their names without suffix, in natural order."""

    description = f"a folder of pairs, images ({', '.join(IMAGE_SUFFIXES)}) and .txt of one name"

    def __init__(self, source: Path, reading: Reading) -> None:
        super().__init__(source, reading)
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
        if reading.chosen is not None:
            reading.chosen.check_all_in(self._pairs, source.name)
            self._pairs = {id_: pair for id_, pair in self._pairs.items() if id_ in reading.chosen}
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
    """What a file is to a post; lists of ids are nothing to it."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.endswith(LIST_SUFFIX):
        return None
    if suffix not in (*IMAGE_SUFFIXES, ".txt"):
        return None
    return "text" if suffix == ".txt" else "image"


def _natural(name: str) -> list[str | int]:
    """Sorts 2 before 10: text and numbers alternate, so that like compares with like."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
