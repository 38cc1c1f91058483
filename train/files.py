"""Files put in place by one rename, so that nobody reads half of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once.

    Raises:
        ConfigError: the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="out") from error


def write_json(path: Path, content: Any) -> None:
    """The same for JSON.

    Raises:
        ConfigError: the folder cannot be written.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")
