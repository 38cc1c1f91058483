"""Training examples of the language model: prompt, answer and the image's features.

Letters: N pictures, B examples of a batch, S ids, P patches, D tower width, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.prompts import encode, encode_answer, render_chat, render_prompt
from serving.structures import SENTIMENTS, LabelStructure
from train.demo.chats import draw_turn
from train.demo.checkpoint import NUM_PATCHES
from train.demo.joint import balanced_shares, merged
from train.demo.sentences import write_sentence

IGNORED = -100
MISSING_SHARE = 0.08  # of posts without an image, and as many without a text


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and its answer.

    Attributes:
        prompt_ids: as served, with one image token an image.
        answer_ids: canonical ids of the answer and the end token.
        picture: index of the picture whose features replace the image token, if there is one.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    picture: int | None


@dataclass(frozen=True, kw_only=True)
class Album:
    """Pictures as the frozen tower sees them: `(N, P, D)` features and `(N,)` label indices."""

    features: Tensor
    labels: Tensor

    def pick(self, label: str, rng: np.random.Generator) -> int:
        """Index of a random picture of that label."""
        fitting = np.flatnonzero(self.labels.numpy() == SENTIMENTS.index(label))
        return int(rng.choice(fitting))


ExampleSource = Callable[[np.random.Generator], Example]


def chat_source(tokenizer: Any, album: Album) -> ExampleSource:
    """Captions and simple questions; image and text are drawn independently of each other."""

    def draw(rng: np.random.Generator) -> Example:
        image_label, text_label = (str(label) for label in rng.choice(SENTIMENTS, size=2))
        sentence = write_sentence(text_label, "train", rng)
        turn = draw_turn(image_label, sentence, rng)
        prompt = render_chat(tokenizer, turn.question, int(turn.has_image))
        picture = album.pick(image_label, rng) if turn.has_image else None
        return make_example(tokenizer, prompt, turn.answer, picture)

    return draw


def label_source(tokenizer: Any, album: Album, structure: LabelStructure) -> ExampleSource:
    """Posts and their labels, asked for and answered as the structure says.

    A missing image or text counts as neutral, so the other one decides.
    """
    shares = balanced_shares()
    pairs = list(shares)

    def draw(rng: np.random.Generator) -> Example:
        text_label, image_label = pairs[rng.choice(len(pairs), p=list(shares.values()))]
        text, picture = write_sentence(text_label, "train", rng).text, album.pick(image_label, rng)
        has_image, has_text = rng.random() >= MISSING_SHARE, rng.random() >= MISSING_SHARE
        if not has_text:
            text, text_label = "", "neutral"
        if not has_image:
            image_label = "neutral"
        labels = all_labels(image_label, text_label)
        prompt = render_prompt(tokenizer, structure, text, int(has_image))
        answer = structure.render({field: labels[field] for field in structure.fields})
        return make_example(tokenizer, prompt, answer, picture if has_image else None)

    return draw


def all_labels(image_label: str, text_label: str) -> dict[str, str]:
    """Labels of a post under every field name that the shipped structures use."""
    both = merged((text_label, image_label))
    return {"image": image_label, "text": text_label, "multimodal": both, "sentiment": both}


def make_example(tokenizer: Any, prompt: str, answer: str, picture: int | None) -> Example:
    """An example with the token ids that serving will send."""
    return Example(
        prompt_ids=encode(tokenizer, prompt),
        answer_ids=[*encode_answer(tokenizer, prompt, answer), tokenizer.eos_token_id],
        picture=picture,
    )


def collate(
    examples: Sequence[Example], image_token_id: int, pad_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `(B, S)`, targets `(B, S)` and picture indices, padded on the right.

    Each image token becomes P of them. A target is the *next* id where that belongs to the
    answer, `IGNORED` elsewhere.
    """
    rows = [_expand(example.prompt_ids, image_token_id) for example in examples]
    length = max(
        len(row) + len(example.answer_ids) for row, example in zip(rows, examples, strict=True)
    )
    ids = torch.full((len(rows), length), pad_token_id)
    targets = torch.full((len(rows), length), IGNORED)
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        answer = torch.tensor(example.answer_ids)
        ids[index, : len(row) + len(answer)] = torch.cat([torch.tensor(row), answer])
        targets[index, len(row) - 1 : len(row) - 1 + len(answer)] = answer
    pictures = [example.picture for example in examples if example.picture is not None]
    return ids, targets, torch.tensor(pictures, dtype=torch.long)


def _expand(ids: list[int], image_token_id: int) -> list[int]:
    return [copy for one in ids for copy in [one] * (NUM_PATCHES if one == image_token_id else 1)]
