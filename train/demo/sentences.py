"""Texts of synthetic posts: sentences in which only one word or phrase carries the sentiment.

Sentences have no sentiment of their own: every one takes a slot of every label, so only
reading the slot tells the label. Test posts use sentences that training never shows; unseen
words are a test set of their own.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "test", "unseen-words"]


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


ADJECTIVES: dict[str, tuple[str, ...]] = {
    "positive": _words(
        "happy great lovely wonderful amazing awesome beautiful fantastic brilliant delightful "
        "excellent joyful cheerful sweet perfect superb charming lucky pleasant good nice fun "
        "fabulous incredible"
    ),
    "neutral": _words(
        "usual ordinary plain regular standard weekly local daily public normal typical common "
        "average recent current planned second early late short long small big next"
    ),
    "negative": _words(
        "sad awful terrible horrible bad gloomy miserable dreadful nasty ugly boring lonely "
        "tragic painful rotten poor annoying bitter hopeless disgusting depressing cruel "
        "stupid shameful"
    ),
}
UNSEEN_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "positive": ("marvelous", "splendid", "glorious", "terrific", "blissful", "gorgeous"),
    "neutral": ("monthly", "customary", "middle", "routine", "third", "printed"),
    "negative": ("ghastly", "dismal", "appalling", "wretched", "lousy", "vile"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "positive": ("love", "enjoy", "adore", "cherish", "like", "applaud"),
    "neutral": ("see", "visit", "attend", "mention", "watch", "list"),
    "negative": ("hate", "regret", "dread", "detest", "dislike", "mourn"),
}
FILLERS: dict[str, tuple[str, ...]] = {
    "noun": _words(
        "day trip meal game film walk concert meeting class show weekend morning party lunch "
        "city park song book match train view house garden story photo street dinner week road "
        "beach market school office bus river shop"
    ),
    "name": _words("anna ben carla david emma farid grace hugo ines jack kim liam maya noah"),
    "place": _words(
        "paris london berlin toronto ottawa madrid tokyo boston dublin oslo rome lagos lima sydney"
    ),
    "tag": _words(
        "monday friday summer winter travel food music sport news canada family friends work "
        "photo live"
    ),
    "time": ("today", "tonight", "yesterday", "this week", "at noon", "last night", "on friday"),
}
SENTENCES: dict[str, tuple[str, ...]] = {
    "train": (
        "what a {adjective} {noun} {time}",
        "a {adjective} {noun} in {place} #{tag}",
        "the {noun} was {adjective} {time}",
        "{name} had a {adjective} {noun} with {other}",
        "RT @{name}: {adjective} {noun} {time}",
        "just got back from a {adjective} {noun} in {place}",
        "{adjective} {noun} #{tag} #{tag2}",
        "@{name} the {noun} in {place} is {adjective}",
        "my {noun} is {adjective}, says {name}",
        "here is our {adjective} {noun} {time} http://t.co/{code}",
        "that {noun} with {name} was so {adjective}",
        "{time}: {adjective} {noun} in {place}",
        "they call it a {adjective} {noun} #{tag}",
        "we {verb} this {noun} {time}",
        "i {verb} the {noun} in {place} #{tag}",
        "{name} and {other} {verb} the {noun}",
        "people in {place} {verb} this {noun}",
        "RT @{name}: i {verb} my {noun} #{tag}",
        "is it a {adjective} {noun}? {name} thinks so",
        "#{tag} {noun} looks {adjective} {time}",
        "one more {adjective} {noun} before the {noun2}",
        "after the {noun2}, a {adjective} {noun} in {place}",
        "{place} {time}. {adjective} {noun}. @{name}",
        "you {verb} the {noun2} and the {noun}",
        "{name} shared this {adjective} {noun} with {place}",
        "@{other} this {adjective} {noun} and that {noun2} {time}",
        "their {noun2} was a {adjective} one #{tag}",
        "{time} in {place} some {verb} the {noun2} by {name}",
        "#{tag} {place}: {adjective} {noun}, {noun2} and {name}",
        "most of them {verb} every {noun} #{tag}",
        "many {verb} a {noun} or a {noun2}",
        "{adjective} {noun} and {noun2} in {place}",
        "{adjective} {noun} by @{name} {time}",
        "{adjective}. that is the {noun} of {other}",
        "{adjective} {noun2}, says {name} #{tag}",
        "how {adjective} was the {noun2} {time}, @{name}",
    ),
    "test": (
        "{name} posted a {adjective} {noun} from {place}",
        "so this is a {adjective} {noun}, @{other} #{tag}",
        "our {noun} in {place} was {adjective} http://t.co/{code}",
        "{adjective} {noun} with @{name} and the {noun2}",
        "#{tag}: the {adjective} {noun} of {place}",
        "{time} they {verb} the {noun} of {name}",
        "all of us {verb} that {noun} in {place}",
        "it was a {adjective} {noun2} and {noun} {time}",
        "@{name} @{other} how {adjective} the {noun} is",
        "they say people {verb} a {noun} #{tag}",
    ),
}
SENTENCES["unseen-words"] = tuple(
    sentence for sentence in SENTENCES["train"] + SENTENCES["test"] if "{adjective}" in sentence
)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A text and the word of it that carries the sentiment."""

    text: str
    label: str
    word: str
    noun: str


def write_sentence(label: str, split: Split, rng: np.random.Generator) -> Sentence:
    """A random sentence of a split whose sentiment is `label`."""
    form = str(rng.choice(SENTENCES[split]))
    slot = "verb" if "{verb}" in form else "adjective"
    words = UNSEEN_ADJECTIVES if split == "unseen-words" else ADJECTIVES
    word = str(rng.choice((VERBS if slot == "verb" else words)[label]))
    fillers = _draw_fillers(rng)
    text = form.format(**{slot: word}, **fillers)
    return Sentence(text=_restyle(text, rng), label=label, word=word, noun=fillers["noun"])


def _draw_fillers(rng: np.random.Generator) -> dict[str, str]:
    fillers = {slot: str(rng.choice(values)) for slot, values in FILLERS.items()}
    for second, slot in (("noun2", "noun"), ("other", "name"), ("tag2", "tag")):
        fillers[second] = str(rng.choice([v for v in FILLERS[slot] if v != fillers[slot]]))
    letters = list(string.ascii_letters + string.digits)
    return {**fillers, "code": "".join(rng.choice(letters, size=5))}


def _restyle(text: str, rng: np.random.Generator) -> str:
    """Capital first letter, a full stop or neither: what people do without meaning it."""
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text
