"""What a small LLaVA trained from nothing looks like and how long it learns."""

from __future__ import annotations

from dataclasses import dataclass

from train.demo.checkpoint import Shape


@dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """How the vision tower is trained.

    Attributes:
        num_topics: of the texts, which the tower learns to tell from the picture.
        num_descriptions: principal components of the image descriptors, likewise.
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.1
    num_topics: int = 32
    num_descriptions: int = 48


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """How projector and language model are trained, in one of their two stages.

    Attributes:
        dropout: share of each layer's outputs that is zeroed in training.
        word_dropout: share of a text's words that are left out.
        missing: share of questions without the image, and as many without the text.
        writing: share of examples in which the text is to be written from the picture.
        text_weight: of the loss on all other words beside the loss on labels.
        average: decay a step of the moving average of the weights that is kept in the end.
    """

    num_steps: int
    learning_rate: float
    batch_size: int = 48
    weight_decay: float = 0.1
    warmup_share: float = 0.08
    dropout: float = 0.05
    word_dropout: float = 0.15
    missing: float = 0.1
    writing: float = 0.05
    text_weight: float = 0.1
    average: float = 0.97


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of model, with the training that fits it.

    Attributes:
        reading: the language model on texts alone, which are shorter without pictures.
        language: projector and language model on whole posts, after that.
    """

    shape: Shape
    max_vocab_size: int
    tower: TowerRecipe
    reading: LanguageRecipe
    language: LanguageRecipe
    num_folds: int = 5


def _small() -> Size:
    """For a few thousand posts and two CPU cores."""
    return Size(
        shape=Shape(text_width=192, text_mlp_width=512, text_layers=2),
        max_vocab_size=8192,
        tower=TowerRecipe(num_steps=400),
        reading=LanguageRecipe(num_steps=1200, learning_rate=2.5e-3),
        language=LanguageRecipe(num_steps=300, learning_rate=1.5e-3),
    )


SIZES = {"small": _small}
