"""Teachers: linear models on word and letter counts and on image descriptors, out of fold.

Letters: N posts, C labels of a field, D image descriptors.

What a teacher says of a post comes from posts other than this one, so a student that learns it
by heart has not learned the post's label: what it then knows of its own training posts is worth
as much as what it knows of others. That leaves the labels for the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import KFold
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from train.scratch.corpus import Corpus
from train.scratch.descriptors import describe_images
from train.scratch.settings import Size

VIEWS = ("both", "text", "image")
# Inverse strength of the penalty, and how much the descriptors weigh beside the text, chosen by
# cross-validation within the training posts of MVSA-Single.
PENALTY = {"both": 4.0, "text": 6.0, "image": 0.5}
IMAGE_WEIGHT = 0.7


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What teachers say of each post.

    Attributes:
        said: by view and field, e.g. `both/image`, `(N, C)` probabilities.
        sights: `(N, T)` standardised numbers that the tower learns to tell from the image.
        figures: accuracy and weighted F1 of what was said, by view and field; not kept in files.
    """

    said: Mapping[str, np.ndarray]
    sights: np.ndarray
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def teach(corpus: Corpus, size: Size, seed: int) -> Lessons:
    """Fits the teachers and collects what they say."""
    described = describe_images(corpus.pixels)
    said = _say_out_of_fold(corpus, described, size.num_folds, seed)
    figures = {
        f"{view}/{field}": _rate(corpus.labels[field], said[f"{view}/{field}"])
        for view in VIEWS
        for field in corpus.fields
    }
    sights = _sights(corpus, described, said, size, seed)
    return Lessons(said=said, sights=sights, figures=figures)


def save_lessons(lessons: Lessons, path: Path) -> None:
    """Writes what is needed to learn from, without the figures, as one npz file."""
    np.savez(path, allow_pickle=False, sights=lessons.sights, **lessons.said)


def load_lessons(path: Path) -> Lessons:
    """What `save_lessons` wrote."""
    with np.load(path) as arrays:
        said = {name: arrays[name] for name in arrays.files}
    return Lessons(sights=said.pop("sights"), said=said)


def words() -> FeatureUnion:
    """Counts of words and their pairs, and of letters in words: a hashtag is several words."""
    return FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
            (
                "letters",
                TfidfVectorizer(
                    analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True
                ),
            ),
        ]
    )


def _say_out_of_fold(
    corpus: Corpus, described: np.ndarray, num_folds: int, seed: int
) -> dict[str, np.ndarray]:
    said = {
        f"{view}/{field}": np.zeros((len(corpus), len(labels)), dtype=np.float32)
        for view in VIEWS
        for field, labels in corpus.fields.items()
    }
    folds = KFold(num_folds, shuffle=True, random_state=seed)
    for fit, held in tqdm(
        folds.split(described), total=num_folds, desc="teachers", unit="fold", disable=None
    ):
        views = _views(corpus, described, fit)
        for name, given in said.items():
            view, field = name.split("/", 1)
            given[held] = _fit_and_say(views[view], corpus.labels[field], fit, held, given.shape[1])
    return said


def _views(corpus: Corpus, described: np.ndarray, fit: np.ndarray) -> dict[str, Any]:
    """Feature matrices of all posts, scaled by the posts of `fit` alone."""
    counted = words().fit([corpus.texts[index] for index in fit]).transform(corpus.texts)
    scaler = StandardScaler().fit(described[fit])
    pictures = scaler.transform(described) / np.sqrt(described.shape[1])
    both = hstack([counted, IMAGE_WEIGHT * csr_matrix(pictures)]).tocsr()
    return {"both": both, "text": counted.tocsr(), "image": pictures}


def _fit_and_say(
    features: Any, labels: np.ndarray, fit: np.ndarray, held: np.ndarray, num_labels: int
) -> np.ndarray:
    """Probabilities of the held posts, `(H, C)`; labels that `fit` lacks get 0."""
    known = fit[labels[fit] >= 0]
    said = np.zeros((len(held), num_labels), dtype=np.float32)
    seen = np.unique(labels[known])
    if len(seen) == 1:
        said[:, seen] = 1
        return said
    view = "image" if isinstance(features, np.ndarray) else "both"
    model = LogisticRegression(C=PENALTY[view], max_iter=1000)
    said[:, seen] = model.fit(features[known], labels[known]).predict_proba(features[held])
    return said


def _sights(
    corpus: Corpus, described: np.ndarray, said: Mapping[str, np.ndarray], size: Size, seed: int
) -> np.ndarray:
    """Targets of the tower: what the picture looks like, what its text is about, how both feel.

    Topics of the texts as targets are Gomez et al.'s (2017, arXiv 1705.08631).
    """
    recipe = size.tower
    looks = make_pipeline(StandardScaler(), PCA(recipe.num_descriptions, random_state=seed))
    topics = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=3),
        TruncatedSVD(recipe.num_topics, random_state=seed),
    )
    feelings = [
        np.log(said[f"{view}/{field}"] + 1e-3)
        for view in ("both", "image")
        for field in corpus.fields
    ]
    columns = [looks.fit_transform(described), topics.fit_transform(corpus.texts), *feelings]
    scaled = [
        StandardScaler().fit_transform(column) / np.sqrt(column.shape[1]) for column in columns
    ]
    return np.concatenate(scaled, axis=1).astype(np.float32)


def _rate(labels: np.ndarray, said: np.ndarray) -> dict[str, float]:
    known = labels >= 0
    answers = said[known].argmax(axis=1)
    return {
        "accuracy": round(float(accuracy_score(labels[known], answers)), 4),
        "weighted_f1": round(float(f1_score(labels[known], answers, average="weighted")), 4),
    }
