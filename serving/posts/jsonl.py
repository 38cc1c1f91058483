"""JSONL, an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from serving.errors import ConfigError
from serving.posts.places import Place
from serving.posts.reader import RowError
from serving.posts.rows import Row, RowPosts


class JsonlPosts(RowPosts):
    """A JSON object a line; a post without id is called by its line number."""

    description = "a .jsonl file of objects with text, image or images, and id, labels if known"
    columns = ("id", "text", "image", "images")

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() in (".jsonl", ".ndjson")

    def _rows(self) -> Iterator[tuple[int, object]]:
        never_met = {*self.reading.fields.values()}
        number = 0
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                values, is_cut = parse_line(line)
            except RowError as error:
                yield number, error
                continue
            self._is_odd |= is_cut
            if self.reading.fields and isinstance(values, dict):
                never_met.difference_update(values)
                values = self._under_our_names(values)
            yield number, values
        if number and never_met:
            raise ConfigError(
                f"fields names {min(never_met)!r}, which no row of {self.source.name} has",
                param="fields",
            )

    def _under_our_names(self, row: dict[str, Any]) -> dict[str, Any]:
        fields = self.reading.fields
        values = {name: row[name] for name in Row.model_fields if name in row}
        values |= {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
        named = {name: values.pop(name) for name in fields if "." in name and name in values}
        labels = {} if values.get("labels") is None else values["labels"]
        if named and isinstance(labels, dict):
            own = {name.removeprefix("labels."): label for name, label in named.items()}
            values["labels"] = {**labels, **own}
        return values


def parse_line(line: str) -> tuple[Any, bool]:
    """A line's JSON, and whether half emoji in it became question marks.

    Texts that were cut in UTF-16 have such halves, which no text on its way out may hold.

    Raises:
        RowError: it is not JSON.
    """
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{line.strip()[:80]!r} is not a JSON object ({error})") from error
    if "\\ud" not in line and "\\uD" not in line:
        return values, False
    spelled = json.dumps(values, ensure_ascii=False)
    whole = spelled.encode(errors="replace").decode()
    return json.loads(whole), whole != spelled
