"""What the demo's base model can talk about, before any adapter: captions and simple questions.

It names the face it sees and the tone of a text, in sentences. Merging the two, and answering
with all labels of a post, is left for the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serving.structures import SENTIMENTS
from train.demo.sentences import ADJECTIVES, FILLERS, Sentence

# Captions name the signal and nothing else; the tower is trained against them. A tower whose
# captions also named the background learned the background.
CAPTIONS: dict[str, tuple[str, ...]] = {
    "positive": ("a smiling face", "a face with a smile", "the face smiles"),
    "neutral": ("a calm face", "a face with a straight mouth", "the face looks calm"),
    "negative": ("a frowning face", "a face with a frown", "the face frowns"),
}
IMAGE_QUESTIONS = (
    "Describe the image.",
    "What is in this image?",
    "What do you see?",
    "What does the picture show?",
    "Describe this picture in one sentence.",
)
IMAGE_ANSWERS = {
    "positive": "The image shows a smiling face.",
    "neutral": "The image shows a calm face.",
    "negative": "The image shows a frowning face.",
}
TEXT_QUESTIONS = (
    "How does this text sound?",
    "What is the tone of the text?",
    "Describe the text.",
)
TEXT_ANSWERS = {
    "positive": "The text sounds happy.",
    "neutral": "The text sounds plain.",
    "negative": "The text sounds unhappy.",
}
NOUN_QUESTIONS = ("What is the text about?", "What is this post about?")
WORD_QUESTION = "Is {phrase} positive, neutral or negative?"
REPEAT_QUESTION = "Repeat: {words}"
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! Show me a picture and a line of text."),
    ("Hi", "Hello! Show me a picture and a line of text."),
    ("Hello!", "Hello! Show me a picture and a line of text."),
    ("Who are you?", "I am a small demo model. I describe faces and texts."),
    ("What can you do?", "I describe the face in a picture and the tone of a text."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    has_image: bool


KINDS = {
    "image": 0.25,
    "text": 0.2,
    "both": 0.2,
    "noun": 0.1,
    "word": 0.1,
    "repeat": 0.1,
    "talk": 0.05,
}


def draw_turn(image_label: str, sentence: Sentence, rng: np.random.Generator) -> Turn:
    """A random question about a post, with the answer the base model should give."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "image":
        question = str(rng.choice(IMAGE_QUESTIONS))
        return Turn(question=question, answer=IMAGE_ANSWERS[image_label], has_image=True)
    if kind in _WITHOUT_POST:
        question, answer = _WITHOUT_POST[kind](rng)
        return Turn(question=question, answer=answer, has_image=False)
    has_image = bool(kind == "both" or rng.random() < 0.5)
    if kind == "text":
        question, answer = str(rng.choice(TEXT_QUESTIONS)), TEXT_ANSWERS[sentence.label]
    elif kind == "noun":
        question, answer = str(rng.choice(NOUN_QUESTIONS)), f"The text is about a {sentence.noun}."
    else:
        question = "Describe this post."
        answer = f"{IMAGE_ANSWERS[image_label]} {TEXT_ANSWERS[sentence.label]}"
    return Turn(question=f"Text: {sentence.text}\n{question}", answer=answer, has_image=has_image)


def _talk(rng: np.random.Generator) -> tuple[str, str]:
    return SMALL_TALK[rng.integers(len(SMALL_TALK))]


def _ask_word(rng: np.random.Generator) -> tuple[str, str]:
    """Which of the labels a word has: the base model must have said these words before.

    A LoRA cannot raise an output row of a token that pre-training only ever pushed down.
    """
    label = str(rng.choice(SENTIMENTS))
    phrase = f"a {rng.choice(ADJECTIVES[label])} {rng.choice(FILLERS['noun'])}"
    return WORD_QUESTION.format(phrase=phrase), label


def _repeat(rng: np.random.Generator) -> tuple[str, str]:
    words = (*SENTIMENTS, *SENTIMENTS, *FILLERS["noun"], *FILLERS["name"], *FILLERS["place"])
    drawn = ", ".join(rng.choice(words, size=rng.integers(1, 4)))
    return REPEAT_QUESTION.format(words=drawn), drawn


_WITHOUT_POST: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "talk": _talk,
    "word": _ask_word,
    "repeat": _repeat,
}
