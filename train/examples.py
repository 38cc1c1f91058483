"""Training examples: a post's prompt and answer in token ids, and where its images are.

Letters: B examples of a batch, S ids, K visual tokens an image, D tower width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from patches.selection import num_kept
from serving.errors import ConfigError
from serving.posts import ImageSource, Post
from serving.prompts import encode, render_prompt
from serving.structures import LabelStructure
from train.model import Llava
from train.recipes import Recipe
from train.sight import Sight

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Example:
    """One post as the model is trained on it.

    Attributes:
        id: the post's.
        prompt_ids: as served, with one image token an image.
        answer_ids: canonical ids of the answer and the end token.
        weights: how much each answer id counts in the loss.
        images: in the prompt's order.
    """

    id: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    weights: Sequence[float]
    images: tuple[ImageSource | bytes, ...]


class Examples(Dataset[Example]):
    """Posts in token ids, held as flat arrays: some 250 bytes a post and its image paths.

    Args:
        model: whose tokenizer and chat template.
        structure: what is asked; every post needs a label in each of its fields.
        posts: read once.
        weight_power: a label weighs (n / C n_label) to this power in the loss.
        prompts: phrasings of the structure's prompt that take turns, post by post; none stands
            for the structure's own.

    Raises:
        ConfigError: a post has no label in a field, or one that the structure does not allow; or
            there are no posts.
    """

    def __init__(
        self,
        model: Llava,
        structure: LabelStructure,
        posts: Iterable[Post],
        *,
        weight_power: float = 0.0,
        prompts: Sequence[str] = (),
    ) -> None:
        constraint = model.constraint(structure)
        eos = int(model.tokenizer.eos_token_id)
        self._answers: list[list[int]] = []  # of each combination of labels
        self._labels: list[dict[str, str]] = []
        known: dict[tuple[str, ...], int] = {}
        asked = cycle([rephrase(structure, prompt) for prompt in prompts] or [structure])
        encoded: list[np.ndarray] = []
        kinds: list[int] = []
        self.ids: list[str] = []
        self._images: list[tuple[ImageSource | bytes, ...]] = []
        for post in posts:
            labels = check_labels(structure, post)
            kind = known.setdefault(tuple(labels.values()), len(known))
            if kind == len(self._answers):
                self._answers.append([*constraint.answer_ids(labels), eos])
                self._labels.append(labels)
            prompt = render_prompt(model.tokenizer, next(asked), post.text, len(post.images))
            encoded.append(np.array(encode(model.tokenizer, prompt), dtype=np.int32))
            kinds.append(kind)
            self.ids.append(post.id)
            self._images.append(post.images)
        if not encoded:
            raise ConfigError("no posts to train on; look at --data, --train-split", param="data")
        self.kinds = np.array(kinds)
        self._prompts = np.concatenate(encoded)
        self._ends = np.cumsum([len(prompt) for prompt in encoded])
        self._weights = [[1.0] * len(answer) for answer in self._answers]
        if weight_power:
            self._weigh_fields(model, structure, weight_power)

    def _weigh_fields(self, model: Llava, structure: LabelStructure, power: float) -> None:
        """Each field's labels by how rare they are; the ids of a label share its weight."""
        constraint = model.constraint(structure)
        rarity = {field: self.label_weights(field) for field in structure.fields}
        for kind, labels in enumerate(self._labels):
            weights: list[float] = []
            for tokens in constraint.fields:
                rare = rarity[tokens.name][labels[tokens.name]] ** power
                weights += [rare] * len(tokens.segments[labels[tokens.name]])
            rest = len(self._answers[kind]) - len(weights)
            self._weights[kind] = [*weights, *[1.0] * rest]

    def label_weights(self, field: str) -> dict[str, float]:
        """N / (C n_label) of each of a field's C labels, scikit-learn's `balanced`."""
        counts = self.label_counts()[field]
        return {label: len(self) / (len(counts) * count) for label, count in counts.items()}

    def label_counts(self) -> dict[str, dict[str, int]]:
        """Posts by field and label."""
        counts: dict[str, dict[str, int]] = {}
        for kind, amount in enumerate(np.bincount(self.kinds, minlength=len(self._labels))):
            for field, label in self._labels[kind].items():
                by_label = counts.setdefault(field, {})
                by_label[label] = by_label.get(label, 0) + int(amount)
        return counts

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """Ids of each example, images expanded."""
        answers = np.array([len(answer) for answer in self._answers])[self.kinds]
        images = np.array([len(images) for images in self._images])
        prompts = np.diff(self._ends, prepend=0)
        return prompts + answers + images * (tokens_per_image - 1)

    def draw_weights(self) -> np.ndarray:
        """How often to draw each example so that the last field's labels come equally often."""
        last = list(self._labels[0])[-1]
        rare = self.label_weights(last)
        return np.array([rare[labels[last]] for labels in self._labels])[self.kinds]

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Example:
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        kind = int(self.kinds[index])
        return Example(
            id=self.ids[index],
            prompt_ids=self._prompts[start:end].tolist(),
            answer_ids=self._answers[kind],
            weights=self._weights[kind],
            images=self._images[index],
        )


def rephrase(structure: LabelStructure, prompt: str) -> LabelStructure:
    """The structure that asks for the same in other words."""
    return LabelStructure.model_validate({**structure.model_dump(), "prompt": prompt})


def check_labels(structure: LabelStructure, post: Post) -> dict[str, str]:
    """The post's label in each field of the structure.

    Raises:
        ConfigError: one is missing or not allowed; names the post.
    """
    labels = {}
    for field, allowed in structure.fields.items():
        label = post.labels.get(field)
        if label not in allowed:
            fault = "has no label" if label is None else f"has label {label!r}"
            raise ConfigError(
                f"post {post.id!r} {fault} in {structure.name}.{field}; allowed are "
                f"{list(allowed)}; mend it, or leave such posts out with --skip-unlabelled",
                param="data",
            )
        labels[field] = label
    return labels


class Collator:
    """Examples to tensors of a batch, padded on the right.

    Args:
        model: for ids and the image processor.
        sight: holds the features where `is_cached`, and makes pixels otherwise.
        recipe: which share of the visual tokens is kept.
        is_cached: features come from disk; otherwise the tower runs in the step.
    """

    def __init__(self, model: Llava, sight: Sight, recipe: Recipe, *, is_cached: bool) -> None:
        self._sight, self._recipe, self._is_cached = sight, recipe, is_cached
        self._image_id = int(model.config.image_token_id)
        self._pad_id = int(model.tokenizer.pad_token_id)
        self._num_kept = num_kept(model.num_patches, recipe.retention_ratio)

    @property
    def tokens_per_image(self) -> int:
        """K."""
        return self._num_kept

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`input_ids`, `labels` and `weights` `(B, S)`; `features` or `pixel_values` of the images.

        A label is the *next* id where that belongs to the answer, `IGNORED` elsewhere. Padding
        stands on the right, where causal attention does not see it from the left.
        """
        rows = [self._expand(example.prompt_ids) for example in examples]
        length = max(len(r) + len(e.answer_ids) for r, e in zip(rows, examples, strict=True))
        ids = torch.full((len(rows), length), self._pad_id)
        labels = torch.full((len(rows), length), IGNORED)
        weights = torch.zeros(len(rows), length)
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            answer, start = torch.tensor(example.answer_ids), len(row) - 1
            end = start + len(answer)
            ids[index, : end + 1] = torch.cat([torch.tensor(row), answer])
            labels[index, start:end] = answer
            weights[index, start:end] = torch.tensor(example.weights)
        return {"input_ids": ids, "labels": labels, "weights": weights, **self._images(examples)}

    def _images(self, examples: Sequence[Example]) -> Mapping[str, Tensor]:
        images = [(example.id, image) for example in examples for image in example.images]
        if not images:
            return {}
        if not self._is_cached:
            return {"pixel_values": self._sight.pixels(images)}
        if self._recipe.retention_ratio == 1.0:
            rows = [self._sight.row_of(image) for _, image in images]
            return {"features": self._sight.features_at(rows)}
        kept = (self._recipe.retention_ratio, self._recipe.selector)
        return {"features": torch.stack([self._sight.at(i).keep(*kept) for _, i in images])}

    def _expand(self, ids: Sequence[int]) -> list[int]:
        """Each image token becomes K of them."""
        kept = self._num_kept
        return [copy for one in ids for copy in [one] * (kept if one == self._image_id else 1)]
