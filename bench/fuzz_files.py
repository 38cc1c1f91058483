"""Damaged image files, decoded as the server does in a process that each may end."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bench.bad_pictures import BROKEN, FORMATS, ODD, encoded, small
from bench.mutations import damaged
from bench.outcome import progress
from bench.pictures import picture
from serving.errors import BadRequestError
from serving.images import ImageLimits, decode_image

DECODED, REFUSED, FAILED = "decoded", "refused", "failed"
_HANG_S, _START_S = 10.0, 60.0
_HEAVY = ("thousand-scans", "ten-thousand-frames", "4000x4000", "profile-bomb", "long-comment")
_LIMITS = ImageLimits(max_pixels=1_000_000)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An input that was neither answered nor refused.

    Attributes:
        kind: format or endpoint.
        what: that happened instead.
        raw: the input.
    """

    kind: str
    what: str
    raw: bytes

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}; input: {base64.b64encode(self.raw).decode()}"


def file_of(seed: int, number: int) -> tuple[str, bytes]:
    """The format and the bytes of a damaged file."""
    rng = random.Random(f"{seed}/file/{number}")
    form = FORMATS[number % len(FORMATS)]
    return form, damaged(rng.choice(_seeds()[form]), rng)


_SEEDS: dict[str, list[bytes]] = {}


def _seeds() -> dict[str, list[bytes]]:
    """Small valid files by format; made once a process."""
    if not _SEEDS:
        _SEEDS.update({form: [small(form), small(form, 1)] for form in FORMATS})
        makers = {**ODD, "cut-png": BROKEN["cut-png"]}
        for name, make in makers.items():
            if name not in _HEAVY:
                _SEEDS[_form_of(make())].append(make())
        _SEEDS["JPEG"].append(encoded(picture(0, 3, (32, 32)), "JPEG", progressive=True))
        _SEEDS["WEBP"].append(encoded(picture(0, 3, (32, 32)), "WEBP", lossless=True))
    return _SEEDS


def _form_of(raw: bytes) -> str:
    heads = {b"\x89P": "PNG", b"\xff\xd8": "JPEG", b"RI": "WEBP", b"GI": "GIF", b"BM": "BMP"}
    return heads[raw[:2]]


def fuzz_files(
    seed: int, seconds: float, most: int | None = None
) -> tuple[dict[str, Counter[str]], list[Failure]]:
    """Decodes damaged files in a child process; a new one after one that ended."""
    counts = {form: Counter[str]() for form in FORMATS}
    failures: list[Failure] = []
    ends, number = time.monotonic() + seconds, 0
    while time.monotonic() < ends and (most is None or number < most):
        for kind, outcome in _decoded_elsewhere(seed, number, ends, most):
            form, raw = file_of(seed, number)
            counts[form][kind] += 1
            if kind == FAILED:
                failures.append(Failure(kind=form, what=outcome, raw=raw))
                progress(str(failures[-1]))
            number += 1
    return counts, failures


def _decoded_elsewhere(
    seed: int, first: int, ends: float, most: int | None
) -> Iterator[tuple[str, str]]:
    """Outcomes of files from number `first` on, until one ends the process."""
    readable, writable = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.fuzz_files", str(seed), str(first), str(writable)],
        pass_fds=[writable],
    )
    os.close(writable)
    number = first
    with Connection(readable, writable=False) as outcomes:
        try:
            while time.monotonic() < ends and (most is None or number < most):
                if not outcomes.poll(_HANG_S + (_START_S if number == first else 0)):
                    yield FAILED, f"took over {_HANG_S:.0f} s"
                    return
                try:
                    yield outcomes.recv()
                except EOFError:
                    yield FAILED, f"ended its process with {process.wait()}"
                    return
                number += 1
        finally:
            process.kill()
            process.wait()


def main(seed: int, number: int, writable: int) -> None:
    """Decodes files from a number on and sends what came of each, until nobody reads."""
    warnings.simplefilter("ignore")  # of Pillow, about what it repairs
    with Connection(writable, readable=False) as outcomes:
        while True:
            try:
                outcomes.send(_decode(file_of(seed, number)[1]))
            except BrokenPipeError:
                return
            number += 1


def _decode(raw: bytes) -> tuple[str, str]:
    try:
        image = decode_image(raw, _LIMITS)
    except BadRequestError:
        return REFUSED, ""
    except BaseException as error:  # whatever it is, it is what we look for
        return FAILED, repr(error)[:200]
    return (DECODED, "") if image.mode == "RGB" else (FAILED, f"mode {image.mode}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
