"""What a labelling run came to: counts, labels, quality where labels are known, cost."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from serving.errors import SieveError
from serving.posts import Post


@dataclass(frozen=True, kw_only=True)
class Result:
    """A post with the body of its `/v1/label` answer, or with its error."""

    post: Post
    response: dict[str, Any] | None = None
    error: SieveError | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Agreement with the known labels of one field, over the labelled posts that have one.

    Attributes:
        num_known: how many those are.
        accuracy: share of equal labels.
        macro_f1: mean F1 of the labels that are known or answered, each counted alike.
    """

    num_known: int
    accuracy: float
    macro_f1: float

    @classmethod
    def of(cls, pairs: Mapping[tuple[str, str], int]) -> Quality:
        """Quality of counts by (known, answered)."""
        total = sum(pairs.values())
        labels = {label for pair in pairs for label in pair}
        return cls(
            num_known=total,
            accuracy=sum(pairs.get((label, label), 0) for label in labels) / total,
            macro_f1=sum(_f1(pairs, label) for label in labels) / len(labels),
        )


def _f1(pairs: Mapping[tuple[str, str], int], label: str) -> float:
    """F1 = 2 TP / (2 TP + FP + FN): twice the hits over all times the label occurs."""
    occurs = sum(count * pair.count(label) for pair, count in pairs.items())
    return 2 * pairs.get((label, label), 0) / occurs


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in numbers.

    Attributes:
        posts: how many were read.
        labelled: how many have labels.
        failed: how many have not, by the error's code, or its type where it has none.
        examples: the first failed post and its error, by the same reasons.
        distribution: labels answered, by field.
        quality: by field, where posts have known labels of that field.
        mean_kept: visual tokens kept of a post with images; None where no post had any.
        mean_patches: visual tokens of a post with images, before selection.
        mean_prompt_tokens: of a labelled post; None where there is none.
        wall_s: seconds from the first post to the last answer.
        num_not_utf8: texts that were not UTF-8.
    """

    posts: int
    labelled: int
    failed: dict[str, int]
    examples: dict[str, str]
    distribution: dict[str, dict[str, int]]
    quality: dict[str, Quality]
    mean_kept: float | None
    mean_patches: float | None
    mean_prompt_tokens: float | None
    wall_s: float
    num_not_utf8: int = 0

    @property
    def posts_per_s(self) -> float:
        """Posts a second, failed ones included."""
        return self.posts / self.wall_s if self.wall_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "posts_per_s": self.posts_per_s}

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.labelled} of {self.posts} posts labelled in {self.wall_s:.1f} s, "
            f"{self.posts_per_s:.1f} posts/s"
        ]
        for reason, count in self.failed.items():
            lines.append(f"failed with {reason}: {count}, first {self.examples[reason]}")
        for field, labels in self.distribution.items():
            total = sum(labels.values())
            shares = [f"{label} {n} ({100 * n / total:.1f} %)" for label, n in labels.items()]
            lines.append(f"{field}: {', '.join(shares)}")
        for field, quality in self.quality.items():
            lines.append(
                f"{field} on {quality.num_known} known labels: accuracy {quality.accuracy:.4f}, "
                f"macro-F1 {quality.macro_f1:.4f}"
            )
        return lines + self._cost_lines()

    def _cost_lines(self) -> list[str]:
        lines = []
        if self.mean_kept is not None:
            lines.append(f"visual tokens: {self.mean_kept:.1f} of {self.mean_patches:.1f} kept")
        if self.mean_prompt_tokens is not None:
            lines.append(f"prompt tokens: {self.mean_prompt_tokens:.1f} on average")
        if self.num_not_utf8:
            lines.append(f"texts that were not UTF-8: {self.num_not_utf8}, read as Windows-1252")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Tally:
    """Counts results as they come; memory does not grow with them."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._failed: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._pairs: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._num_labelled = self._num_with_images = 0
        self._kept = self._patches = self._prompt_tokens = 0

    def add(self, result: Result) -> None:
        """Counts one result."""
        if result.error is not None:
            reason = result.error.code or result.error.type
            self._failed[reason] += 1
            self._examples.setdefault(reason, f"post {result.post.id!r}: {result.error.message}")
        if result.response is not None:
            self._add_labels(result.post, result.response["labels"])
            self._add_cost(result.response)

    def _add_labels(self, post: Post, labels: Mapping[str, str]) -> None:
        self._num_labelled += 1
        for field, label in labels.items():
            self._labels[field][label] += 1
            if field in post.labels:
                self._pairs[field][post.labels[field], label] += 1

    def _add_cost(self, response: Mapping[str, Any]) -> None:
        self._prompt_tokens += response["usage"]["prompt_tokens"]
        if response["retention"]["patches"]:
            self._num_with_images += 1
            self._kept += response["retention"]["kept"]
            self._patches += response["retention"]["patches"]

    def summary(self) -> Summary:
        """The numbers so far."""
        return Summary(
            posts=self._num_labelled + self._failed.total(),
            labelled=self._num_labelled,
            failed=dict(self._failed.most_common()),
            examples=self._examples,
            distribution={name: dict(n.most_common()) for name, n in self._labels.items()},
            quality={field: Quality.of(pairs) for field, pairs in self._pairs.items()},
            mean_kept=_mean(self._kept, self._num_with_images),
            mean_patches=_mean(self._patches, self._num_with_images),
            mean_prompt_tokens=_mean(self._prompt_tokens, self._num_labelled),
            wall_s=time.perf_counter() - self._started,
        )


def _mean(total: int, count: int) -> float | None:
    return total / count if count else None
