"""How often answers are right: accuracy, F1, per class, confusion; scikit-learn counts.

Letters: N posts that have a label in the field, C labels the field allows.

Macro-F1 is the mean over the labels that are known or answered, scikit-learn's own default and
what `python -m serving label` prints, so that the two can be held side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from serving.posts import Post
from serving.structures import LabelStructure
from train.predict import Prediction

METRICS = ("accuracy", "macro_f1", "weighted_f1")


@dataclass(frozen=True, kw_only=True)
class Marked:
    """Answers in one field beside the truth, of the posts that have a label there.

    Attributes:
        labels: allowed labels in the structure's order, C of them.
        ids: the posts', N of them.
        true: `(N,)` int, positions in `labels`.
        guessed: `(N,)` int.
        confidence: `(N,)` float, the probability of the answered label; empty where there is none.
        num_unlabelled: posts that have no label in this field and count nowhere else.
    """

    labels: tuple[str, ...]
    ids: tuple[str, ...]
    true: np.ndarray
    guessed: np.ndarray
    confidence: np.ndarray = field(default_factory=lambda: np.empty(0))
    num_unlabelled: int = 0

    def of(self, ids: Collection[str]) -> Marked:
        """The part that belongs to some of the posts."""
        rows = np.array([row for row, own in enumerate(self.ids) if own in ids], dtype=int)
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            true=self.true[rows],
            guessed=self.guessed[rows],
            confidence=self.confidence[rows] if len(self.confidence) else self.confidence,
        )


def mark(
    structure: LabelStructure, posts: Sequence[Post], predictions: Sequence[Prediction]
) -> dict[str, Marked]:
    """Answers beside the truth, by field, where anybody answered and anything is known.

    Args:
        structure: whose fields and labels count.
        posts: with their known labels.
        predictions: one a post, in the same order.
    """
    pairs = list(zip(posts, predictions, strict=True))
    assert all(post.id == answer.id for post, answer in pairs), "answers of other posts"
    marked = {}
    for name, labels in structure.fields.items():
        known = [(p, a) for p, a in pairs if name in p.labels and name in a.labels]
        if known:
            marked[name] = _mark_field(name, labels, known, len(pairs) - len(known))
    return marked


def _mark_field(
    name: str,
    labels: tuple[str, ...],
    known: Sequence[tuple[Post, Prediction]],
    num_unlabelled: int,
) -> Marked:
    index = {label: position for position, label in enumerate(labels)}
    confidence = [
        a.probabilities[name][a.labels[name]] for _, a in known if name in a.probabilities
    ]
    return Marked(
        labels=labels,
        ids=tuple(post.id for post, _ in known),
        true=np.array([index[post.labels[name]] for post, _ in known]),
        guessed=np.array([index[answer.labels[name]] for _, answer in known]),
        confidence=np.array(confidence if len(confidence) == len(known) else []),
        num_unlabelled=num_unlabelled,
    )


def measure(marked: Marked) -> dict[str, Any]:
    """Figures of one field, ready for JSON.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`; `per_class` with precision, recall, f1 and support
        by label; `confusion` `(C, C)`, a row a true label; `labels`; `posts` that counted and
        those `unlabelled`.
    """
    true, guessed, every = marked.true, marked.guessed, np.arange(len(marked.labels))
    columns = precision_recall_fscore_support(true, guessed, labels=every, zero_division=0)
    precision, recall, f1, support = (column.tolist() for column in columns)
    occurs = np.isin(every, np.concatenate([true, guessed]))
    per_class = {
        label: {"precision": precision[i], "recall": recall[i], "f1": f1[i], "support": support[i]}
        for i, label in enumerate(marked.labels)
    }
    return {
        "posts": len(marked.ids),
        "unlabelled": marked.num_unlabelled,
        "accuracy": float(accuracy_score(true, guessed)),
        "macro_f1": float(np.mean(np.array(f1)[occurs])),
        "weighted_f1": float(np.average(f1, weights=support)),
        "labels": list(marked.labels),
        "per_class": per_class,
        "confusion": confusion_matrix(true, guessed, labels=every).tolist(),
    }


def count_labels(structure: LabelStructure, posts: Sequence[Post]) -> dict[str, dict[str, int]]:
    """How many posts have each label, by field."""
    return {
        name: {label: sum(p.labels.get(name) == label for p in posts) for label in labels}
        for name, labels in structure.fields.items()
    }
