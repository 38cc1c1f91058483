"""A batch in numbers, for people and machines, and its progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from serving.batch.counts import BINS, Counts
from serving.batch.outcomes import Outcome


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """A run so far, earlier processes' work included.

    Attributes:
        counts: of all published posts.
        num_now: posts that this process labelled, failures included.
        wall_s: seconds it took for them, the engine's start not included.
        start_s: seconds the engine took to start; 0 where it was not needed.
        num_left_out: posts that the data set's own rule, or `--duplicates first`, left out.
        cascade: the ratios asked in turn, if any.
        abstain: the bar, if any.
    """

    counts: Counts
    num_now: int
    wall_s: float
    start_s: float
    num_left_out: int = 0
    cascade: tuple[float, ...] | None = None
    abstain: float | None = None

    @property
    def posts_per_s(self) -> float:
        """Of this process."""
        return self.num_now / self.wall_s if self.num_now and self.wall_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            **self.counts.as_dict(),
            "left_out": self.num_left_out,
            "this_run": {
                "posts": self.num_now,
                "wall_s": round(self.wall_s, 3),
                "start_s": round(self.start_s, 3),
                "posts_per_s": round(self.posts_per_s, 3),
            },
        }

    def lines(self) -> list[str]:
        """For people."""
        counts = self.counts
        lines = [f"{counts['labelled']} of {counts['posts']} posts labelled"]
        if self.num_now:
            lines.append(
                f"this run: {self.num_now} posts in {self.wall_s:.1f} s, {self.posts_per_s:.1f} "
                f"posts/s; the engine took {self.start_s:.0f} s to start"
            )
        if self.num_left_out:
            lines.append(f"left out, duplicate ids or the data set's rule: {self.num_left_out}")
        for (stage, code), number in counts.below("failure").items():
            lines.append(f"failed at {stage} with {code}: {number}")
        lines += self._model_lines()
        if counts["patches"]:
            saved = counts["patches"] - counts["visual_tokens"]
            lines.append(
                f"visual tokens: {counts['visual_tokens']:,} read, {saved:,} saved "
                f"({100 * saved / counts['patches']:.1f} %)"
            )
        if counts["repeats"]:
            lines.append(f"equal to a post before them: {counts['repeats']}")
        if self.abstain is not None:
            lines.append(f"to review, confidence below {self.abstain}: {counts['abstained']}")
        return lines

    def _model_lines(self) -> list[str]:
        lines = []
        quality = self.counts.quality()
        for model, fields in self.counts.distribution().items():
            for name, labels in fields.items():
                total = sum(labels.values())
                shares = [f"{label} {n} ({100 * n / total:.1f} %)" for label, n in labels.items()]
                lines.append(f"{model} {name}: {', '.join(shares)}")
            for name, found in quality.get(model, {}).items():
                lines.append(
                    f"{model} {name} on {found.num_known} known labels: accuracy "
                    f"{found.accuracy:.4f}, macro-F1 {found.macro_f1:.4f}"
                )
            lines.append(f"{model} confidence: {histogram_line(self.counts.histogram(model))}")
            lines += self._cascade_line(model)
        return lines

    def _cascade_line(self, model: str) -> list[str]:
        if self.cascade is None:
            return []
        asked = {int(n): m for (n,), m in self.counts.below("asked", model).items()}
        total = sum(asked.values())
        went_up = sum(number for steps, number in asked.items() if steps > 1)
        return [f"{model} cascade: {went_up} of {total} ({100 * went_up / total:.1f} %) went up"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)


_BARS = " ▁▂▃▄▅▆▇█"


def histogram_line(bins: list[int]) -> str:
    """A histogram in one line, from 0 to 1, with the share of its upper bins."""
    most = max(bins) or 1
    bars = "".join(_BARS[0 if not n else 1 + round(7 * n / most)] for n in bins)
    total = sum(bins) or 1
    sure = sum(bins[int(0.9 * BINS) :])
    return f"0 |{bars}| 1, {100 * sure / total:.1f} % at 0.9 or more"


class Progress:
    """A bar with rate, tokens saved, errors and time left; a line a minute without a terminal."""

    def __init__(self, bar: tqdm, left: int | None, every_s: float = 60.0) -> None:
        self._bar, self._left, self._every_s = bar, left, every_s
        self._kept = self._patches = 0
        self.num_done = self.num_failed = 0
        self.started = self._told = time.monotonic()

    @classmethod
    @contextmanager
    def shown(cls, total: int | None, done: int) -> Iterator[Progress]:
        """On the terminal, or as lines where there is none."""
        with tqdm(
            total=total,
            initial=done,
            unit="post",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            smoothing=0.05,
        ) as bar:
            yield cls(bar, None if total is None else total - done)

    def add(self, outcome: Outcome) -> None:
        """One post more."""
        self.add_posts(
            1,
            failed=outcome.error is not None,
            kept=sum(answer.visual_tokens for answer in outcome.answers),
            patches=sum(answer.patches for answer in outcome.answers),
        )

    def add_posts(self, posts: int, *, failed: int, kept: int, patches: int) -> None:
        """Posts more, some of them failed, with their visual tokens."""
        self.num_done += posts
        self.num_failed += failed
        self._kept += kept
        self._patches += patches
        self._bar.set_postfix(errors=self.num_failed, saved=self._saved, refresh=False)
        self._bar.update(posts)
        if self._bar.disable and time.monotonic() - self._told > self._every_s:
            self._tell()

    @property
    def _saved(self) -> str:
        return f"{100 * (1 - self._kept / self._patches):.0f}%" if self._patches else "-"

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = self.num_done / (self._told - self.started)
        time_left = ""
        if self._left is not None:
            time_left = f", {(self._left - self.num_done) / rate / 60:.0f} min left"
        print(
            f"{self.num_done} posts, {rate:.1f} posts/s, {self.num_failed} errors, "
            f"tokens saved {self._saved}{time_left}",
            file=sys.stderr,
            flush=True,
        )
