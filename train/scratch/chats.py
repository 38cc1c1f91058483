"""What the base model is asked about a post, and what it should say.

Letters: B examples of a batch, S ids, P patches.

The base says how a post feels in words of its own; the prompts and the forms of answers that are
served (`serving.structures`) are left to the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from serving.prompts import as_plain_text, encode, encode_answer, render_chat
from serving.structures import STRUCTURES
from train.scratch.corpus import Corpus
from train.scratch.settings import LanguageRecipe
from train.scratch.teacher import Lessons

QUESTIONS = (
    "How does the {field} feel: {labels}?",
    "{labels}: which of them is the {field}?",
    "What is the {field} like, {labels}?",
    "Which feeling has the {field}: {labels}?",
)
WRITING = ("Write a text for this picture.", "What would be written under this picture?")
"""Requests for the text of a post, of which the model sees the picture only."""
POOL = 8  # batches that are drawn at once and sorted by length


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with its answer.

    Attributes:
        ids: of prompt and answer, with one image token an image; all are to be learned.
        soft_at: place in `ids` of the answer's first id where that is one of several labels.
        soft: what is to be learned there, probability by id.
        picture: index of the post whose picture is shown, if one is.
    """

    ids: list[int]
    soft_at: int | None
    soft: dict[int, float]
    picture: int | None


class Examiner:
    """Draws examples from posts and what the teachers say of them."""

    def __init__(
        self, corpus: Corpus, lessons: Lessons, tokenizer: Any, recipe: LanguageRecipe
    ) -> None:
        self.corpus = corpus
        self.lessons = lessons
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.fields = list(corpus.fields)
        bare = render_chat(tokenizer, "", 0)
        self._answers = {
            label: [*encode_answer(tokenizer, bare, label), tokenizer.eos_token_id]
            for labels in corpus.fields.values()
            for label in labels
        }

    def batches(self, batch_size: int, rng: np.random.Generator) -> Iterator[list[Example]]:
        """Batches without end, of like lengths; every post once before any is drawn again."""
        drawn = self._epochs(rng)
        while True:
            pool = list(islice(drawn, POOL * batch_size))
            pool.sort(key=lambda example: len(example.ids) + 1000 * (example.picture is not None))
            for start in rng.permutation(POOL) * batch_size:
                yield pool[start : start + batch_size]

    def _epochs(self, rng: np.random.Generator) -> Iterator[Example]:
        while True:
            for post in rng.permutation(len(self.corpus)):
                yield self.draw(int(post), rng)

    def draw(self, post: int, rng: np.random.Generator) -> Example:
        """A random example about a post."""
        has_image = bool(self.corpus.has_image[post])
        has_text = bool(self.corpus.texts[post])
        if has_image and has_text and rng.random() < self.recipe.writing:
            return self._write(post, rng)
        if has_image and has_text:
            hidden = rng.random()
            has_image = hidden >= self.recipe.missing
            has_text = not self.recipe.missing <= hidden < 2 * self.recipe.missing
        return self._ask(post, has_image, has_text, rng)

    def _write(self, post: int, rng: np.random.Generator) -> Example:
        prompt = render_chat(self.tokenizer, str(rng.choice(WRITING)), 1)
        text = as_plain_text(self.tokenizer, self.corpus.texts[post])
        ids = [*encode(self.tokenizer, f"{prompt} {text}"), self.tokenizer.eos_token_id]
        return Example(ids=ids, soft_at=None, soft={}, picture=post)

    def _ask(self, post: int, has_image: bool, has_text: bool, rng: np.random.Generator) -> Example:
        field = str(rng.choice(self.fields))
        labels = self.corpus.fields[field]
        listed = ", ".join(rng.permutation(labels))
        question = str(rng.choice(QUESTIONS)).format(field=field, labels=listed)
        text = self._vary(self.corpus.texts[post], rng) if has_text else ""
        prompt = render_chat(self.tokenizer, f"Text: {text}\n{question}", int(has_image))
        view = {(True, True): "both", (True, False): "image"}.get((has_image, has_text), "text")
        said = self.lessons.said[f"{view}/{field}"][post]
        soft: dict[int, float] = {}
        for label, share in zip(labels, said, strict=True):
            first = self._answers[label][0]
            soft[first] = soft.get(first, 0.0) + float(share)
        before = encode(self.tokenizer, prompt)
        answer = self._answers[labels[rng.choice(len(labels), p=said / said.sum())]]
        return Example(
            ids=before + answer,
            soft_at=len(before),
            soft=soft,
            picture=post if has_image else None,
        )

    def _vary(self, text: str, rng: np.random.Generator) -> str:
        """Words left out, hash marks taken off, and another case, at random."""
        kept = [word for word in text.split() if rng.random() >= self.recipe.word_dropout]
        if rng.random() < 0.2:
            kept = [word.lstrip("#") for word in kept]
        varied = " ".join(kept)
        if rng.random() < 0.3:
            varied = varied.lower()
        return as_plain_text(self.tokenizer, varied)


def tokenizer_corpus(corpus: Corpus) -> Iterator[str]:
    """What the tokenizer's pieces are learned from: texts, questions, answers.

    Labels come after every question, so that each of them becomes one piece where it is short.
    """
    for text in corpus.texts:
        yield f"USER: Text: {text}"
        yield text.lower()
    for _ in range(20):
        for structure in STRUCTURES.values():
            for labels in structure.answers():
                yield f"USER: {structure.prompt} ASSISTANT: {structure.render(labels)}"
        for field, known in corpus.fields.items():
            for question in QUESTIONS:
                asked = question.format(field=field, labels=", ".join(known))
                for label in known:
                    yield f"USER: {asked} ASSISTANT: {label}"
