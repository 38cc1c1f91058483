"""A run in numbers that add up over shards: labels, confidence, tokens, failures, quality."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from serving.batch.outcomes import Outcome
from serving.summary import Quality

BINS = 20
Key = tuple[str, ...]


class Counts:
    """Counts of outcomes by name; those of shards are added up.

    Args:
        items: what `as_json` gave.
    """

    def __init__(self, items: Iterable[tuple[Sequence[str], int]] = ()) -> None:
        self.counter: Counter[Key] = Counter({tuple(key): number for key, number in items})

    def as_json(self) -> list[tuple[list[str], int]]:
        """For a commit."""
        return [(list(key), number) for key, number in sorted(self.counter.items())]

    def __iadd__(self, other: Counts) -> Counts:
        self.counter.update(other.counter)
        return self

    def __getitem__(self, key: str | Key) -> int:
        return self.counter[(key,) if isinstance(key, str) else key]

    def below(self, *prefix: str) -> dict[Key, int]:
        """Counts whose names start so, without that start."""
        n = len(prefix)
        return {key[n:]: m for key, m in sorted(self.counter.items()) if key[:n] == prefix}

    def add(self, outcome: Outcome, *, abstains: bool = False) -> None:
        """Counts one post."""
        count = self.counter
        count["posts",] += 1
        if outcome.error is not None:
            count["failed",] += 1
            count["failure", outcome.error["stage"], outcome.error["code"]] += 1
            count["retryable",] += bool(outcome.error["retryable"])
            return
        count["labelled",] += 1
        count["repeats",] += outcome.is_repeat
        count["abstained",] += abstains
        for answer in outcome.answers:
            count["answers",] += 1
            count["visual_tokens",] += answer.visual_tokens
            count["patches",] += answer.patches
            count["asked", answer.model, str(answer.num_asked)] += 1
            bin_ = min(BINS - 1, int(answer.confidence * BINS))
            count["bin", answer.model, f"{bin_:02d}"] += 1
            for field, label in answer.labels.items():
                count["label", answer.model, field, label] += 1
                if field in outcome.known:
                    count["pair", answer.model, field, outcome.known[field], label] += 1

    def distribution(self) -> dict[str, dict[str, dict[str, int]]]:
        """Labels answered, by model and field, the most frequent first."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for (model, field, label), number in self.below("label").items():
            found.setdefault(model, {}).setdefault(field, {})[label] = number
        return {
            model: {f: dict(Counter(labels).most_common()) for f, labels in fields.items()}
            for model, fields in found.items()
        }

    def histogram(self, model: str) -> list[int]:
        """Answers by confidence, in `BINS` bins from 0 to 1."""
        bins = self.below("bin", model)
        return [bins.get((f"{i:02d}",), 0) for i in range(BINS)]

    def quality(self) -> dict[str, dict[str, Quality]]:
        """Agreement with known labels, by model and field."""
        pairs: defaultdict[tuple[str, str], dict[tuple[str, str], int]] = defaultdict(dict)
        for (model, field, known, answered), number in self.below("pair").items():
            pairs[model, field][known, answered] = number
        found: dict[str, dict[str, Quality]] = {}
        for (model, field), counts in pairs.items():
            found.setdefault(model, {})[field] = Quality.of(counts)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For people's scripts: nested, with names."""
        models = sorted({model for (model, _), _ in self.below("asked").items()})
        return {
            **{
                name: self[name]
                for name in ("posts", "labelled", "failed", "retryable", "abstained", "repeats")
            },
            "failures": [
                {"stage": stage, "code": code, "posts": number}
                for (stage, code), number in self.below("failure").items()
            ],
            "distribution": self.distribution(),
            "confidence_histogram": {model: self.histogram(model) for model in models},
            "asked": {
                model: {steps: n for (steps,), n in self.below("asked", model).items()}
                for model in models
            },
            "quality": {
                model: {field: vars(quality) for field, quality in fields.items()}
                for model, fields in self.quality().items()
            },
            "visual_tokens": self["visual_tokens"],
            "patches": self["patches"],
        }
