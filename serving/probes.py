"""Probes: fixed questions whose exact answers travel with an adapter.

`train` writes them with what the trained model answers in Hugging Face, `serving verify` asks them
again in vLLM. Pictures are stored as a seed and a size and painted anew on both sides, so no post
is in them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import AdapterError

PROBES_NAME = "probes.json"
_BLOCKS = 8  # colour blocks along each side: attention over them is far from uniform

Logprobs = dict[str, dict[str, float]]
"""Natural log-probability of each label, by field; a field's given the labels before it."""


class Strict(BaseModel):
    """Part of `probes.json`; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Picture(Strict):
    """A picture that is the same wherever it is painted.

    Attributes:
        seed: of the colours (NumPy's PCG64).
        width: pixels.
        height: pixels.
    """

    seed: int = Field(ge=0)
    width: int = Field(gt=0, le=4096)
    height: int = Field(gt=0, le=4096)

    def paint(self) -> Image.Image:
        """Blocks of random colours, RGB."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        colours = rng.integers(0, 256, (_BLOCKS, _BLOCKS, 3), dtype=np.uint8)
        size = (self.width, self.height)
        return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


class Answers(Strict):
    """What base and adapter answer to a probe, in float32."""

    base: Logprobs
    adapter: Logprobs


class Probe(Strict):
    """One question: a post and a retention ratio; `answers` where they are known."""

    text: str
    picture: Picture | None = None
    ratio: float = Field(gt=0.0, le=1.0)
    answers: Answers | None = None

    @property
    def title(self) -> str:
        """For a table, e.g. `320x240, seed 3, r=0.4`."""
        if self.picture is None:
            return "text alone"
        picture = self.picture
        return f"{picture.width}x{picture.height}, seed {picture.seed}, r={self.ratio:g}"


class Probes(Strict):
    """The content of `probes.json`.

    Attributes:
        structure: name of the label structure that is asked for.
        selector: which patches are kept.
        probes: the questions.
    """

    structure: str
    selector: str = "cls"
    probes: tuple[Probe, ...] = Field(min_length=1)

    @property
    def are_answered(self) -> bool:
        """Whether every question has its answers."""
        return all(probe.answers is not None for probe in self.probes)

    def save(self, folder: Path) -> None:
        """Writes them into an adapter's folder."""
        text = self.model_dump_json(indent=2, exclude_none=True)
        (folder / PROBES_NAME).write_text(text + "\n", encoding="utf-8")


def load_probes(folder: Path) -> Probes | None:
    """The probes of an adapter's folder, or None where there are none.

    Raises:
        AdapterError: there are some, and they are not valid.
    """
    path = folder / PROBES_NAME
    if not path.exists():
        return None
    try:
        probes = Probes.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"adapter {folder.name!r}: {PROBES_NAME} is not valid: {error}"
        ) from error
    if not probes.are_answered:
        raise AdapterError(f"adapter {folder.name!r}: {PROBES_NAME} has probes without answers")
    return probes


_TEXTS = (
    "What a great day in the park with friends!",
    "The train is late again and nobody says why.",
    "New opening hours start on Monday.",
)
_SIZES = ((320, 240), (240, 360), (256, 256))  # wide, high, square: crop and pad differ
_RATIOS = (1.0, 0.4)


def questions(num_pictures: int) -> list[Probe]:
    """Each picture at two ratios, and the first texts without a picture."""
    alone = [Probe(text=text, picture=None, ratio=1.0) for text in _TEXTS]
    shown = []
    for seed in range(num_pictures):
        width, height = _SIZES[seed % len(_SIZES)]
        picture = Picture(seed=seed, width=width, height=height)
        text = _TEXTS[seed % len(_TEXTS)]
        shown += [Probe(text=text, picture=picture, ratio=ratio) for ratio in _RATIOS]
    return [*shown, *alone]
