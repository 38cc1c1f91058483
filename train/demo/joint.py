"""How often each pair of a text label and an image label occurs.

The demo's posts are synthetic; only these counts come from real ones. They are MVSA-Single's
(Niu et al., 2016), of the 4,061 posts whose two labels do not contradict each other.
"""

from __future__ import annotations

import numpy as np

from serving.posts import merge_labels
from serving.structures import SENTIMENTS

Pair = tuple[str, str]  # (text label, image label), MVSA's order

MVSA_COUNTS: dict[Pair, int] = {
    ("positive", "positive"): 1262,
    ("positive", "neutral"): 230,
    ("neutral", "positive"): 923,
    ("neutral", "neutral"): 423,
    ("neutral", "negative"): 383,
    ("negative", "neutral"): 193,
    ("negative", "negative"): 647,
}


def merged(pair: Pair) -> str:
    """The multimodal label of a pair."""
    text, image = pair
    return merge_labels(image, text)


def mvsa_shares() -> dict[Pair, float]:
    """Shares of the pairs as in MVSA-Single."""
    total = sum(MVSA_COUNTS.values())
    return {pair: count / total for pair, count in MVSA_COUNTS.items()}


def balanced_shares() -> dict[Pair, float]:
    """Merged labels equally often, and the pairs of one merged label equally often.

    Then the text alone, or the image alone, decides 7 of 9 posts at the best.
    """
    merges = [merged(pair) for pair in MVSA_COUNTS]
    return {pair: 1 / len(SENTIMENTS) / merges.count(merged(pair)) for pair in MVSA_COUNTS}


def best_single_accuracy(shares: dict[Pair, float], position: int) -> float:
    """Accuracy on the merged label that a perfect reader of one side alone cannot exceed.

    Args:
        shares: shares of the pairs, summing to 1.
        position: 0 to know the text's label only, 1 to know the image's label only.
    """
    best = 0.0
    for known in SENTIMENTS:
        by_merged = dict.fromkeys(SENTIMENTS, 0.0)
        for pair, share in shares.items():
            if pair[position] == known:
                by_merged[merged(pair)] += share
        best += max(by_merged.values())
    return best


def draw_pairs(shares: dict[Pair, float], count: int, rng: np.random.Generator) -> list[Pair]:
    """That many pairs in random order, each as often as its share says, up to rounding."""
    pairs = list(shares)
    ends = np.floor(np.cumsum([shares[pair] for pair in pairs]) * count + 0.5).astype(int)
    amounts = np.diff(ends, prepend=0)
    drawn = [pair for pair, amount in zip(pairs, amounts, strict=True) for _ in range(amount)]
    return [drawn[index] for index in rng.permutation(len(drawn))]
