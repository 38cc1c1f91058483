"""Which studies there are. To add one: a module of this package with a `Study`, and a line here."""

from __future__ import annotations

from dataclasses import dataclass

from serving.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A study as people choose it.

    Attributes:
        summary: what it answers.
        why: the paper, or the doubt, it comes from.
        cost: cells it takes; a training is one, an evaluation of the dev posts is one.
        options: flags that only some studies have, of those it understands.
    """

    summary: str
    why: str
    cost: str
    options: tuple[str, ...] = ()


STUDIES: dict[str, Entry] = {
    "labels": Entry(
        summary="does it help the post's label to train on the image's and the text's as well?",
        why="LLaVAC's ablation: 79.46 % accurate with full labels, 78.13 % with the last alone",
        cost="2 trainings and 2 evaluations a seed, 2 evaluations of the base",
    ),
    "prompts": Entry(
        summary="what is left when the question is put in other words?",
        why="an adapter may have learned one wording: 5 are trained in turns, 5 held out",
        cost="1 training and 10 evaluations a seed (--also-single: twice that), 1 of the base",
        options=("also_single",),
    ),
    "transfer": Entry(
        summary="how good is the adapter on another data set, without training there?",
        why="an adapter may have learned one data set: its words, its label shares, its annotators",
        cost="1 training and 2 evaluations a seed, 1 of the base, TF-IDF once or twice",
        options=("to", "to_split", "to_train_split", "to_fields"),
    ),
    "noise": Entry(
        summary="what do wrong labels of image and text cost, where the post's label is right?",
        why="LLaVAC's gain hangs on unimodal labels, and people label by mistake",
        cost="a training and an evaluation a seed and share (4 shares), 1 of the base",
        options=("shares",),
    ),
    "rank": Entry(
        summary="how many LoRA parameters does it take?",
        why="LLaVAC and LLaVA's own script use rank 128; smaller adapters are cheaper to serve",
        cost="a training and an evaluation a seed and rank (5 ranks), 1 of the base",
        options=("ranks",),
    ),
    "retention": Entry(
        summary="which visual tokens may go, and how many, crop and pad?",
        why="Table 4 of 'Towards Robust Multimodal Sentiment Detection with LLaVA': a gain of "
        "2 of 452 posts, so seeds, intervals, random and stride stand beside the method here",
        cost="1 training, 1 + selectors x ratios below 1 evaluations (21 by default) and 1 with "
        "shuffled images a seed and base, 1 of each base",
        options=("ratios", "selectors", "also_base"),
    ),
}


def find_study(name: str) -> Entry:
    """The study of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in STUDIES:
        raise ConfigError(f"study {name!r} is unknown; allowed are {', '.join(STUDIES)}")
    return STUDIES[name]
