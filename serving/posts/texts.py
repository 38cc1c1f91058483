"""Texts of real data sets, which are not all UTF-8."""

from __future__ import annotations

from collections.abc import Iterator

from serving.errors import ConfigError
from serving.posts.places import Place


def read_text(path: Place) -> tuple[str, bool]:
    """A text file's content, and whether it was not UTF-8.

    Tries utf-8, then cp1252, then latin-1 (which cannot fail): about a quarter of MVSA-Single's
    texts are not UTF-8.
    """
    text, is_odd = decode(path.read_bytes())
    return text.strip(), is_odd


def decode(raw: bytes) -> tuple[str, bool]:
    """Bytes as text, and whether they were not UTF-8; see `read_text`."""
    try:
        return raw.decode().removeprefix("\ufeff"), False
    except UnicodeDecodeError:
        pass
    try:
        return raw.decode("cp1252"), True
    except UnicodeDecodeError:
        return raw.decode("latin-1"), True


def numbered_lines(path: Place) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, without the space around them, with their numbers from 1.

    Raises:
        ConfigError: the file cannot be read.
    """
    for number, line, _ in decoded_lines(path):
        if line.strip():
            yield number, line.strip()


def decoded_lines(path: Place) -> Iterator[tuple[int, str, bool]]:
    """Number from 1, text with its line end, and whether it was not UTF-8, of every line.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        with file:
            for number, raw in enumerate(file, start=1):
                yield number, *decode(raw)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read any further: {error.strerror}") from error
