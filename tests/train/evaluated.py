"""Models for tests of evaluation: they answer from a post's text, no weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from serving.posts import Post
from serving.structures import SENTIMENTS, STRUCTURES, LabelStructure
from train.metrics import Marked
from train.predict import Prediction

Answer = Callable[[Post, float, str], str]


class TalkingModel:
    """Answers the last label by a function of the post; every field gets the same label."""

    def __init__(
        self, answer: Answer, structure: LabelStructure = STRUCTURES["llavac"], *, adapted=True
    ) -> None:
        self.structure, self.answer, self.adapted = structure, answer, adapted
        self.asked: list[tuple[str, float]] = []

    def label(
        self, posts: Sequence[Post], *, ratio: float, selector: str, title: str
    ) -> list[Prediction]:
        self.asked.append((selector, ratio))
        return [self._one(post, ratio, selector) for post in posts]

    def _one(self, post: Post, ratio: float, selector: str) -> Prediction:
        label = self.answer(post, ratio, selector)
        patches = 64 * len(post.images)
        return Prediction(
            id=post.id,
            labels=dict.fromkeys(self.structure.fields, label),
            probabilities={
                field: {one: 0.8 if one == label else 0.1 for one in labels}
                for field, labels in self.structure.fields.items()
            },
            kept=round(ratio * patches),
            patches=patches,
        )

    def write(self, posts: Sequence[Post]) -> list[str]:
        good = self.structure.render(dict.fromkeys(self.structure.fields, "neutral"))
        return [good if index % 4 else "well, hm" for index in range(len(posts))]

    def without_adapter(self) -> TalkingModel | None:
        return TalkingModel(lambda *_: "neutral", self.structure) if self.adapted else None


def marked(true: Sequence[int], guessed: Sequence[int], num_labels: int = 3) -> Marked:
    return Marked(
        labels=tuple(SENTIMENTS[:num_labels]),
        ids=tuple(map(str, range(len(true)))),
        true=np.asarray(true),
        guessed=np.asarray(guessed),
    )


def labeled_posts(count: int, *, seed: int = 0, start: int = 0) -> list[Post]:
    """Posts whose image bytes spell the image's label and whose text spells the text's."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(start, start + count):
        text, image = (SENTIMENTS[i] for i in rng.choice(3, size=2))
        merged = image if text == "neutral" else text
        found.append(
            Post(
                id=f"p{index}",
                text=f"a {text} word {index}",
                images=(image.encode(),),
                labels={"image": image, "text": text, "multimodal": merged, "sentiment": merged},
            )
        )
    return found


def by_image_and_text(post: Post, ratio: float, selector: str) -> str:
    text = next((label for label in SENTIMENTS if label in post.text), "neutral")
    if text != "neutral" or not post.images:
        return text
    return bytes(post.images[0]).decode()


def by_text(post: Post, ratio: float, selector: str) -> str:
    return next((label for label in SENTIMENTS if label in post.text), "neutral")
