"""Small damage to files and JSON bodies, the same for the same random state."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
_WORDS = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320, "", " ",
    "x", "a\0b", "\U0001f600", "../x", "<image>", "data:image/png;base64,", "x" * 3000, [], {},
    [None], [[]], [{}], {"": None}, {"type": "text"}, ["x"] * 50,
)  # fmt: skip


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A file after one to eight changes."""
    found = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        if not found:
            break
        rng.choice(_DAMAGES)(found, rng)
    return bytes(found)


def _set_byte(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] = rng.choice((*_INTERESTING, rng.randrange(256)))


def _set_head(raw: bytearray, rng: random.Random) -> None:
    """Most of what a parser decides on is in the first bytes."""
    raw[rng.randrange(min(64, len(raw)))] = rng.randrange(256)


def _flip_bit(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def _set_word(raw: bytearray, rng: random.Random) -> None:
    form = rng.choice(("<I", ">I", "<H", ">H"))
    size = struct.calcsize(form)
    at = rng.randrange(max(1, len(raw) - size))
    raw[at : at + size] = struct.pack(form, rng.choice(_WORDS) % 2 ** (8 * size))


def _cut(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def _drop(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    del raw[at : at + rng.randint(1, 64)]


def _repeat(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = raw[at : at + rng.randint(1, 256)] * rng.randint(1, 20)


def _insert(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = rng.randbytes(rng.randint(1, 32))


_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _set_byte, _set_head, _flip_bit, _set_word, _cut, _drop, _repeat, _insert,
)  # fmt: skip


def changed(body: Any, rng: random.Random) -> bytes:
    """A JSON body after one to three changes of its values, now and then of its bytes too."""
    value = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        value = _change(value, rng)
    raw = json.dumps(value).encode()
    return damaged(raw, rng) if rng.random() < 0.25 else raw


def _change(body: Any, rng: random.Random) -> Any:
    holder, key = rng.choice([(None, None), *_places(body)])
    if holder is None:
        return copy.deepcopy(rng.choice(_VALUES)) if rng.random() < 0.1 else _with_key(body, rng)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = [holder[key]] * rng.randint(1, 3)
    elif kind == 2:
        holder[key] = {rng.choice(("a", "type", "")): holder[key]}
    else:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return body


def _with_key(body: Any, rng: random.Random) -> Any:
    if isinstance(body, dict):
        name = rng.choice(("x", "", "n", "image", "\u00e9", "model", "__class__"))
        body[name] = copy.deepcopy(rng.choice(_VALUES))
    return body


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value inside, as what holds it and its key there."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    inside = [place for key in keys for place in _places(value[key])]
    return [*((value, key) for key in keys), *inside]
