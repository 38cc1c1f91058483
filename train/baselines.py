"""What a model has to beat: answers that need no model of images, fitted on the training posts.

Each baseline returns a `Prediction` a post, so it is measured exactly as the model is. Where it
knows no probability, there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline

from serving.posts import Post
from serving.structures import LabelStructure
from train.predict import Prediction

MAX_FOLDS = 5
GRID: dict[str, list[Any]] = {
    "classify__C": [1.0, 3.0, 10.0, 30.0],
    "classify__class_weight": [None, "balanced"],
}
SCORING = "f1_weighted"


def majority(
    structure: LabelStructure, train: Sequence[Post], posts: Sequence[Post]
) -> list[Prediction]:
    """The most frequent training label of each field, with the labels' shares as probabilities."""
    counts = {name: Counter(_known(train, name).values()) for name in structure.fields}
    labels, shares = {}, {}
    for name, allowed in structure.fields.items():
        if total := sum(counts[name][label] for label in allowed):
            labels[name] = max(allowed, key=counts[name].__getitem__)
            shares[name] = {label: counts[name][label] / total for label in allowed}
    return [_prediction(post, labels, shares) for post in posts]


def perfect_label(
    structure: LabelStructure, train: Sequence[Post], posts: Sequence[Post], *, known: str
) -> list[Prediction] | None:
    """The best that can be said of the last field by somebody who knows another label exactly.

    Args:
        structure: its last field is what is guessed.
        train: posts that tell which label of the last field goes with each known label.
        posts: posts to answer.
        known: the field that is known, e.g. `text`.

    Returns:
        One a post, without an answer where the post has no such label; None where the training
        posts or all of `posts` have none.
    """
    last = list(structure.fields)[-1]
    allowed = structure.fields[last]
    pairs = Counter(
        (p.labels[known], p.labels[last]) for p in train if known in p.labels and last in p.labels
    )
    if known == last or not pairs or not any(known in post.labels for post in posts):
        return None
    overall = Counter(p.labels[last] for p in train if last in p.labels)

    def best(own: str) -> str:
        # Training posts may not have this label: then the most frequent answer overall.
        counts = {label: pairs[own, label] for label in allowed}
        return max(allowed, key=counts.__getitem__ if any(counts.values()) else overall.__getitem__)

    answers = {
        label: best(label) for label in {p.labels[known] for p in posts if known in p.labels}
    }
    return [
        _prediction(post, {last: answers[post.labels[known]]} if known in post.labels else {})
        for post in posts
    ]


def tfidf(
    structure: LabelStructure, train: Sequence[Post], posts: Sequence[Post], *, seed: int = 0
) -> tuple[list[Prediction], str] | None:
    """Words and word pairs of the text with logistic regression, a classifier a field.

    C and class weight are chosen by cross-validation (weighted F1) on the last field of the
    training posts, which is the one that counts, and serve the other fields too.

    Returns:
        One a post, and a line that says what was chosen; None where training texts have no words.
    """
    last = list(structure.fields)[-1]
    if not _has_words(train, last):
        return None
    settings, chosen = _choose(train, last, seed)
    texts = [post.text for post in posts]
    by_field: dict[str, tuple[list[str], np.ndarray]] = {}
    for name in structure.fields:
        if known := _known(train, name):
            model = _pipeline().set_params(**settings)
            kept = [post for post in train if post.id in known]
            if len(set(known.values())) > 1 and _has_words(train, name):
                model.fit([post.text for post in kept], [post.labels[name] for post in kept])
                by_field[name] = (list(model.classes_), model.predict_proba(texts))
    predictions = []
    for row, post in enumerate(posts):
        shares = {
            name: dict(zip(labels, values[row].tolist(), strict=True))
            for name, (labels, values) in by_field.items()
        }
        labels = {name: max(share, key=share.__getitem__) for name, share in shares.items()}
        predictions.append(_prediction(post, labels, shares))
    return predictions, chosen


def _has_words(train: Sequence[Post], field: str) -> bool:
    """Whether any post with a label of the field has a word that counts."""
    words = _pipeline()["words"].build_analyzer()
    return any(field in post.labels and words(post.text) for post in train)


def _choose(train: Sequence[Post], field: str, seed: int) -> tuple[dict[str, Any], str]:
    known = _known(train, field)
    texts = [post.text for post in train if post.id in known]
    labels = [post.labels[field] for post in train if post.id in known]
    rarest = min(Counter(labels).values(), default=0)
    num_folds = min(MAX_FOLDS, rarest)
    if num_folds < 2 or len(set(labels)) < 2:
        default = {"classify__C": 10.0, "classify__class_weight": None}
        return default, f"C=10, too few training posts of a label ({rarest}) to cross-validate"
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    search = GridSearchCV(_pipeline(), GRID, scoring=SCORING, cv=folds, refit=False)
    search.fit(texts, labels)
    best = dict(search.best_params_)
    return best, (
        f"C={best['classify__C']:g}, class_weight={best['classify__class_weight']}, chosen by "
        f"{num_folds}-fold cross-validation on {len(labels)} training posts "
        f"(weighted F1 {search.best_score_:.3f})"
    )


def _pipeline() -> Pipeline:
    return Pipeline(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
            ("classify", LogisticRegression(max_iter=1000)),
        ]
    )


def _known(posts: Sequence[Post], field: str) -> Mapping[str, str]:
    """Known labels of a field by post id."""
    return {post.id: post.labels[field] for post in posts if field in post.labels}


def _prediction(
    post: Post,
    labels: Mapping[str, str],
    probabilities: Mapping[str, Mapping[str, float]] | None = None,
) -> Prediction:
    return Prediction(
        id=post.id, labels=labels, probabilities=probabilities or {}, kept=0, patches=0
    )
