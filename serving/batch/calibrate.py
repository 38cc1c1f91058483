"""How sure an answer at a low ratio must be, found on posts: `python -m serving calibrate`.

Half of the posts set the bar: the lowest one at which the cascade agrees with the highest ratio as
often as asked for. The other half, which had no say, tells what that bar is worth: agreement,
accuracy where labels are known, and posts a second beside either ratio alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from serving.app import image_limits
from serving.batch.answering import read_answer
from serving.batch.outcomes import Answer, Failure
from serving.batch.prepare import Prepared, Preparer
from serving.cascade import Cascade, climb
from serving.catalogue import Choices
from serving.errors import ConfigError, SieveError
from serving.fitting import Fitting
from serving.labeler import Labeler
from serving.posts import Post, read_posts
from serving.server import running_labeler
from serving.settings import Settings

LEAST_POSTS = 40


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What `python -m serving calibrate` was asked for.

    Attributes:
        agreement: wanted share of posts with the labels of the highest ratio.
        limit: posts that are looked at, chosen at random by `seed`.
        block: posts a timed block.

    Raises:
        ConfigError: a value is not allowed.
    """

    data: str
    cascade: tuple[float, ...]
    agreement: float
    model: str | None = None
    label_structure: str | None = None
    selector: str | None = None
    split: str | None = None
    limit: int = 600
    block: int = 50
    concurrency: int = 32
    seed: int = 0
    as_json: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.agreement <= 1:
            raise ConfigError(
                f"agreement={self.agreement} must be above 0 and up to 1, e.g. 0.98",
                param="agreement",
            )
        if self.limit < LEAST_POSTS:
            raise ConfigError(f"limit={self.limit} must be {LEAST_POSTS} or more", param="limit")
        if len(self.cascade) != 2:
            raise ConfigError(
                f"cascade={list(self.cascade)}: a bar is found for two ratios, e.g. 0.2,1.0",
                param="cascade",
            )
        Cascade(ratios=self.cascade, confidence=1.0)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One post's answers at the low and at the high ratio, and what is known of it."""

    low: Answer
    high: Answer
    known: Mapping[str, str]

    @property
    def agrees(self) -> bool:
        """Whether both have the same labels in every field."""
        return self.low.labels == self.high.labels


def find_bar(pairs: Sequence[Pair], agreement: float) -> float:
    """The lowest bar at which a cascade is expected to agree with the high ratio that often.

    Posts below the bar go up and agree, so a higher bar never agrees less. Of n posts that set the
    bar, (n + 1) (1 - agreement) - 1 may disagree: then posts of the same kind agree as often as
    wanted, on average over choices of the n (conformal risk control, arXiv:2208.02814). Where that
    is fewer than none, or even sure answers disagree, the bar is 1.0: nearly every post goes up.
    """
    allowed = math.floor((len(pairs) + 1) * (1 - agreement) - 1 + 1e-9)
    wrong = sorted((pair.low.confidence for pair in pairs if not pair.agrees), reverse=True)
    if allowed < 0:
        return 1.0
    if len(wrong) <= allowed:
        return min(pair.low.confidence for pair in pairs)
    above = [pair.low.confidence for pair in pairs if pair.low.confidence > wrong[allowed]]
    return min(above, default=1.0)


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (J. Am. Stat. Assoc. 22, 1927)."""
    share, scale = hits / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to label the held-out posts.

    Attributes:
        went_up: share that was asked at the high ratio as well.
        agreement: share with the high ratio's labels, and its interval.
        accuracy: by field with known labels, of the posts that have one.
        posts_per_s: median over the blocks.
        speed_up: over the high ratio alone: median of the blocks' ratios, least and most.
    """

    name: str
    went_up: float
    agreement: float
    agreement_interval: tuple[float, float]
    accuracy: Mapping[str, float]
    posts_per_s: float
    speed_up: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A bar and what it is worth.

    Attributes:
        bar: for `--confidence`.
        num_fit: posts that set it.
        num_held_out: posts that `arms` were measured on.
        num_failed: posts left out, since they could not be labelled.
    """

    ratios: tuple[float, ...]
    wanted: float
    bar: float
    num_fit: int
    num_held_out: int
    num_failed: int
    arms: Sequence[Arm]

    def __str__(self) -> str:
        low, high = self.ratios
        fields = list(self.arms[0].accuracy)
        titles = ["", "asked twice", f"agrees with {high}", *(f"accuracy {f}" for f in fields)]
        rows = [[*titles, "posts/s", f"speed-up over {high} [least, most]"]]
        for arm in self.arms:
            least, most = (f"{100 * edge:.1f}" for edge in arm.agreement_interval)
            speed, slowest, fastest = arm.speed_up
            rows.append(
                [
                    arm.name,
                    f"{100 * arm.went_up:.1f} %",
                    f"{100 * arm.agreement:.1f} % [{least}, {most}]",
                    *(f"{arm.accuracy[field]:.3f}" for field in fields),
                    f"{arm.posts_per_s:.1f}",
                    f"{speed:.2f} [{slowest:.2f}, {fastest:.2f}]",
                ]
            )
        rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(
            [
                f"bar found on {self.num_fit} posts for an agreement of {100 * self.wanted:g} %: "
                f"--cascade {low},{high} --confidence {self.bar:.6f}",
                f"on {self.num_held_out} other posts"
                + (f" ({self.num_failed} could not be labelled)" if self.num_failed else "")
                + ":",
                *lines,
                *self._warnings(),
            ]
        )

    def _warnings(self) -> list[str]:
        """What the held-out posts say against the bar."""
        cascade, high = self.arms[-1], self.arms[1]
        said = []
        if cascade.agreement_interval[1] < self.wanted:
            said.append(
                "the bar does not hold on the other posts: ask for more agreement, or more "
                "posts (--limit)"
            )
        if cascade.posts_per_s < high.posts_per_s:
            said.append(f"this cascade is slower than {self.ratios[1]} alone: too many go up")
        return said


Item = tuple[Post, Prepared]


async def run_calibrate(options: CalibrateOptions, settings: Settings) -> int:
    """Finds the bar, measures it, prints both.

    Raises:
        SieveError: too few posts, or the engine cannot be started.
    """
    items, num_failed = await _prepared(options, settings)
    exact = settings.model_copy(update={"prefix_caching": False})
    async with running_labeler(exact, lambda line: print(line, file=sys.stderr)) as labeler:
        arms = _Arms(labeler, options)
        pairs, failed = await arms.pairs(items)
        num_failed += failed
        if len(pairs) < LEAST_POSTS:
            raise ConfigError(
                f"{len(pairs)} posts could be labelled, {LEAST_POSTS} are needed", param="data"
            )
        found = list(pairs.items())
        fit, held_out = found[::2], found[1::2]
        bar = find_bar([pair for _, pair in fit], options.agreement)
        measured = await arms.measure([items[i] for i, _ in held_out], bar)
        report = Calibration(
            ratios=options.cascade,
            wanted=options.agreement,
            bar=bar,
            num_fit=len(fit),
            num_held_out=len(held_out),
            num_failed=num_failed,
            arms=[_arm(name, bar, [pair for _, pair in held_out], measured) for name in measured],
        )
    print(json.dumps(asdict(report), indent=2) if options.as_json else report)
    return 0


async def _prepared(options: CalibrateOptions, settings: Settings) -> tuple[list[Item], int]:
    """Posts chosen at random, ready for the engine, and how many could not be read."""
    posts = read_posts(Path(options.data), split=options.split)
    chosen = _sample(posts, options.limit, random.Random(options.seed))
    preparer = Preparer(image_limits(settings), Fitting.of(settings.model), num_workers=1)
    try:
        found = await preparer.prepare(chosen)
    finally:
        preparer.close()
    items = [
        (post, one) for post, one in zip(chosen, found, strict=True) if not isinstance(one, Failure)
    ]
    return items, len(chosen) - len(items)


def _sample(posts: Any, limit: int, order: random.Random) -> list[Post]:
    """Reservoir sampling (Vitter's algorithm R): any number of posts, one pass."""
    chosen: list[Post] = []
    for number, post in enumerate(posts):
        if len(chosen) < limit:
            chosen.append(post)
        elif (place := order.randrange(number + 1)) < limit:
            chosen[place] = post
    order.shuffle(chosen)
    return chosen


class _Arms:
    """Labels posts at the low ratio, at the high one, and in the cascade."""

    def __init__(self, labeler: Labeler, options: CalibrateOptions) -> None:
        self._labeler, self._options = labeler, options
        self._gate = asyncio.Semaphore(options.concurrency)
        self._numbers = itertools.count()

    async def _answer(self, item: Item, ratio: float | None, bar: float) -> Answer:
        options = self._options
        choices = Choices(
            model=options.model,
            label_structure=options.label_structure,
            selector=options.selector,
            retention_ratio=ratio,
        )
        cascade = None if ratio else Cascade(ratios=options.cascade, confidence=bar)
        post, prepared = item
        async with self._gate:
            climbed = await climb(
                self._labeler,
                post.text,
                prepared.pictures(),
                choices,
                cascade,
                f"calibrate-{next(self._numbers)}",
            )
        return read_answer(self._labeler, climbed)

    async def pairs(self, items: Sequence[Item]) -> tuple[dict[int, Pair], int]:
        """Both answers of every post that can be labelled, and how many cannot."""

        async def pair(item: Item) -> Pair | None:
            try:
                low, high = [await self._answer(item, r, 1.0) for r in self._options.cascade]
            except SieveError:
                return None
            return Pair(low=low, high=high, known=item[0].labels)

        found = await asyncio.gather(*(pair(item) for item in items))
        good = {number: one for number, one in enumerate(found) if one is not None}
        return good, len(items) - len(good)

    async def measure(self, items: Sequence[Item], bar: float) -> dict[str, list[float]]:
        """Posts a second of every arm in every block; arms are interleaved in shuffled order."""
        low, high = self._options.cascade
        ways = {
            f"{low} alone": partial(self._answer, ratio=low, bar=1.0),
            f"{high} alone": partial(self._answer, ratio=high, bar=1.0),
            f"cascade at {bar:.3f}": partial(self._answer, ratio=None, bar=bar),
        }
        size = self._options.block
        blocks = [items[i : i + size] for i in range(0, len(items), size)]
        blocks = [block for block in blocks if len(block) == size] or [items]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        order = random.Random(self._options.seed)
        for block in blocks:
            for name in order.sample(list(ways), len(ways)):
                started = time.perf_counter()
                await asyncio.gather(*(ways[name](item) for item in block))
                rates[name].append(len(block) / (time.perf_counter() - started))
        return rates


def _arm(name: str, bar: float, pairs: Sequence[Pair], rates: Mapping[str, list[float]]) -> Arm:
    low, high = list(rates)[:2]
    if name == low:
        answers, num_up = [pair.low for pair in pairs], 0
    elif name == high:
        answers, num_up = [pair.high for pair in pairs], 0
    else:
        goes_up = [pair.low.confidence < bar for pair in pairs]
        answers = [p.high if up else p.low for p, up in zip(pairs, goes_up, strict=True)]
        num_up = sum(goes_up)
    same = sum(a.labels == pair.high.labels for a, pair in zip(answers, pairs, strict=True))
    gains = [mine / theirs for mine, theirs in zip(rates[name], rates[high], strict=True)]
    return Arm(
        name=name,
        went_up=num_up / len(pairs),
        agreement=same / len(pairs),
        agreement_interval=wilson(same, len(pairs)),
        accuracy=_accuracy(answers, pairs),
        posts_per_s=median(rates[name]),
        speed_up=(median(gains), min(gains), max(gains)),
    )


def _accuracy(answers: Sequence[Answer], pairs: Sequence[Pair]) -> dict[str, float]:
    hits: dict[str, list[bool]] = {}
    for answer, pair in zip(answers, pairs, strict=True):
        for field, label in answer.labels.items():
            if field in pair.known:
                hits.setdefault(field, []).append(label == pair.known[field])
    return {field: sum(equal) / len(equal) for field, equal in hits.items()}
