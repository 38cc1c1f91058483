"""Where the tokenizer's pieces start: rows that say which texts a piece stands in.

Letters: N posts, V vocabulary, E model width.

A language model that begins with random rows spends most of a short training on finding out which
pieces are alike. Counts say that in seconds: the topics of the texts in which a piece stands, and
how the teachers feel about texts with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from train.scratch.corpus import Corpus

_SCALE = 0.02  # of Llama's random rows
_FEELING_SHARE = 0.5


def embed_pieces(
    corpus: Corpus, said: Mapping[str, np.ndarray], tokenizer: Any, width: int, seed: int
) -> dict[int, np.ndarray]:
    """A start row `(E,)` by id, for the pieces of the texts."""
    counter = TfidfVectorizer(analyzer=_as_pieces(tokenizer), sublinear_tf=True)
    counted = counter.fit_transform(corpus.texts)
    feelings = np.concatenate(
        [np.log(said[f"text/{field}"] + 1e-2) for field in corpus.fields], axis=1
    )
    felt = Ridge(alpha=1.0).fit(counted, feelings).coef_.T
    num_topics = min(width - felt.shape[1], min(counted.shape) - 1)
    topics = TruncatedSVD(num_topics, random_state=seed).fit(counted).components_.T
    joined = np.concatenate(
        [_scaled(felt, width * _FEELING_SHARE), _scaled(topics, width * (1 - _FEELING_SHARE))],
        axis=1,
    )
    # Every number of a row should carry a little of everything, as in trained models.
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    turned = _SCALE * joined @ turn[: joined.shape[1]]
    rows = dict(zip(counter.get_feature_names_out(), turned.astype(np.float32), strict=True))
    return {
        piece_id: rows[piece.lower()]
        for piece, piece_id in tokenizer.get_vocab().items()
        if piece.lower() in rows
    }


def _as_pieces(tokenizer: Any) -> Any:
    """Pieces without their case: a word starts the same however it is written."""
    return lambda text: [piece.lower() for piece in tokenizer.tokenize(f"Text: {text}")]


def _scaled(rows: np.ndarray, energy: float) -> np.ndarray:
    """Rows whose squares sum up to `energy` on average."""
    return rows * np.sqrt(energy / (rows**2).sum(axis=1).mean())
