"""What a trained model answers to fixed questions, in Hugging Face and float32."""

from __future__ import annotations

import gc
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from serving.errors import ConfigError
from serving.posts import Post
from serving.probes import Answers, Logprobs, Probe, Probes, questions
from serving.structures import LabelStructure
from train.model import Llava, load_llava
from train.predict import Prediction, predict
from train.sight import Sight

NUM_PICTURES = 3
_CANDIDATES = 2 * NUM_PICTURES
_CLEAR = 0.02
"""Least lead of the best label's log-probability over the next: float32 sums in another order must
not turn an answer over, as the fields after it depend on it."""


def make_probes(structure: LabelStructure, base: Path, adapter: Path) -> Probes:
    """Questions, and what base and adapter answer to them.

    Args:
        structure: what is asked for.
        base: checkpoint folder or Hugging Face id.
        adapter: PEFT folder.

    Raises:
        ConfigError: checkpoint or adapter do not load, or no question has a clear answer.
    """
    asked = questions(_CANDIDATES)
    with tempfile.TemporaryDirectory() as cache:  # an adapter leaves the tower alone
        of_base = _answers_of(base, None, structure, asked, Path(cache))
        of_adapter = _answers_of(base, adapter, structure, asked, Path(cache))
    clear = [
        Probe(**{**dict(probe), "answers": Answers(base=plain, adapter=tuned)})
        for probe, plain, tuned in zip(asked, of_base, of_adapter, strict=True)
        if is_clear(plain) and is_clear(tuned)
    ]
    shown = [probe for probe in clear if probe.picture is not None]
    alone = [probe for probe in clear if probe.picture is None]
    if not shown:
        raise ConfigError(
            f"{adapter} has no clear answer to any probe: two labels are always within {_CLEAR} in "
            "log-probability, so nothing can be compared; train it for longer",
            param="run",
        )
    chosen = (*shown[: 2 * NUM_PICTURES], *alone[:1])
    return Probes(structure=structure.name, probes=chosen)


def _answers_of(
    base: Path, adapter: Path | None, structure: LabelStructure, asked: Sequence[Probe], cache: Path
) -> list[Logprobs]:
    """Loads a model, asks it and lets go of its memory, which the engine is going to need."""
    model = load_llava(base, adapter)
    found = answers(model, structure, asked, Sight(model, cache))
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def answers(
    model: Llava, structure: LabelStructure, asked: Sequence[Probe], sight: Sight
) -> list[Logprobs]:
    """A model's log-probabilities of all labels to each question, along its own answer."""
    found: list[Logprobs] = [{}] * len(asked)
    for ratio in {probe.ratio for probe in asked}:
        indices = [index for index, probe in enumerate(asked) if probe.ratio == ratio]
        posts = [_post(index, asked[index]) for index in indices]
        # One at a time: padding in a batch would change the last digits.
        predictions = predict(model, structure, posts, sight, ratio=ratio, batch_size=1)
        for index, prediction in zip(indices, predictions, strict=True):
            found[index] = _logprobs(prediction)
    return found


def is_clear(logprobs: Logprobs) -> bool:
    """Whether the best label of every field leads by more than rounding could take away."""
    for labels in logprobs.values():
        best = sorted(labels.values(), reverse=True)[:2]
        if len(best) == 2 and best[0] - best[1] < _CLEAR:
            return False
    return True


def _post(index: int, probe: Probe) -> Post:
    if probe.picture is None:
        return Post(id=str(index), text=probe.text)
    buffer = io.BytesIO()
    probe.picture.paint().save(buffer, "PNG")
    return Post(id=str(index), text=probe.text, images=(buffer.getvalue(),))


def _logprobs(prediction: Prediction) -> Logprobs:
    return {
        name: {label: math.log(max(value, 1e-300)) for label, value in labels.items()}
        for name, labels in prediction.probabilities.items()
    }
