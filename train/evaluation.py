"""The story of an evaluation: which posts, what the model answers, what others answer.

Everything that is predicted is collected here, once; what it comes to is `train.report.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.posts import Post
from serving.structures import LabelStructure
from train.baselines import majority, perfect_label, tfidf
from train.evaluated import EvaluatedModel
from train.predict import Prediction, with_other_images
from train.sight import broken_image
from train.significance import NUM_RESAMPLES

RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        ratios: retention ratios; 1.0 is always among them, the others are compared to it.
        selectors: names in `patches.selection.SELECTORS`.
        seed: of the shuffled images, the folds and the bootstrap.
        num_resamples: of the bootstrap.
        has_baselines: whether anything beside the model is measured.

    Raises:
        ConfigError: a ratio is outside (0, 1], a selector unknown, or something is named twice.
    """

    ratios: tuple[float, ...] = RATIOS
    selectors: tuple[str, ...] = tuple(SELECTORS)
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES
    has_baselines: bool = True

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise ConfigError(
                    f"--ratios {ratio:g} is outside (0, 1]; a ratio is the share of visual tokens "
                    "kept, e.g. 0.4",
                    param="ratios",
                )
        for selector in self.selectors:
            if selector not in SELECTORS:
                raise ConfigError(
                    f"--selectors {selector!r} is unknown; allowed are {', '.join(SELECTORS)}",
                    param="selectors",
                )
        for name, values in (("ratios", self.ratios), ("selectors", self.selectors)):
            if not values or len(set(values)) != len(values):
                raise ConfigError(
                    f"--{name} {','.join(map(str, values))!r} needs at least one value, each once",
                    param=name,
                )
        if 1.0 not in self.ratios:
            object.__setattr__(self, "ratios", (1.0, *self.ratios))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Posts that are evaluated, and how many were left out, by reason."""

    posts: Sequence[Post]
    skipped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the model answered at one selector and ratio, a prediction a post."""

    selector: str
    ratio: float
    predictions: Sequence[Prediction]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was answered, to every post in the same order.

    Attributes:
        structure: its last field is the one that counts.
        posts: with their known labels.
        skipped: posts that were left out, by reason.
        plan: what was asked for.
        cells: by selector, then by ratio as the plan has them.
        baselines: answers beside the model, by name.
        shuffled: the model's answers to each text with another post's images; None where posts
            have no images to shuffle.
        written: what the model wrote without the constraint; None where nobody asked.
        notes: what a reader has to know, e.g. which baseline is missing and why.
    """

    structure: LabelStructure
    posts: Sequence[Post]
    skipped: dict[str, int]
    plan: Plan
    cells: Sequence[Cell]
    baselines: dict[str, Sequence[Prediction]]
    shuffled: Sequence[Prediction] | None
    written: Sequence[str] | None
    notes: Sequence[str]

    @property
    def whole(self) -> Sequence[Prediction]:
        """The model's answers with all visual tokens."""
        return next(cell.predictions for cell in self.cells if cell.ratio == 1.0)


def choose_posts(
    structure: LabelStructure,
    posts: Sequence[Post],
    *,
    skip_unlabelled: bool = False,
    skip_broken: bool = False,
) -> Chosen:
    """Posts that can be evaluated.

    Args:
        structure: whose labels the posts must have.
        posts: as they were read.
        skip_unlabelled: leave out, and count, posts without a label of the last field or with a
            label that the structure does not allow, instead of refusing the latter.
        skip_broken: leave out, and count, posts with an image that does not open.

    Raises:
        ConfigError: a label is outside the structure (names post and label), or no post is left
            with a label of the last field.
    """
    last = list(structure.fields)[-1]
    skipped: dict[str, int] = {}
    kept = []
    for post in posts:
        reason = _fault(structure, post, skip_unlabelled, skip_broken)
        if reason is None:
            kept.append(post)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    if not any(last in post.labels for post in kept):
        fields = sorted({name for post in posts for name in post.labels})
        raise ConfigError(
            f"none of {len(posts)} posts is left with a label {last!r}, which is what "
            f"{structure.name!r} is measured by; fields with labels: {fields or 'none'}, "
            f"left out: {skipped or 'none'}",
            param="data",
        )
    return Chosen(posts=kept, skipped=skipped)


def _fault(
    structure: LabelStructure, post: Post, skip_unlabelled: bool, skip_broken: bool
) -> str | None:
    """Why a post is left out; None where it is not."""
    for name, allowed in structure.fields.items():
        label = post.labels.get(name)
        if label is not None and label not in allowed:
            if skip_unlabelled:
                return f"a label outside {structure.name!r}"
            raise ConfigError(
                f"post {post.id!r}: label {name}={label!r} is not one of {list(allowed)} of "
                f"{structure.name!r}; mend it, or leave such posts out with --skip-unlabelled",
                param="data",
            )
    if skip_unlabelled and list(structure.fields)[-1] not in post.labels:
        return f"no label {list(structure.fields)[-1]!r}"
    if skip_broken and any(broken_image(image) for image in post.images):
        return "an image that does not open"
    return None


def evaluate(
    model: EvaluatedModel, chosen: Chosen, *, train: Sequence[Post] = (), plan: Plan
) -> Evaluation:
    """Asks the model at every selector and ratio, and beside it everything it has to beat.

    Args:
        model: in Hugging Face or behind a server.
        chosen: posts to answer.
        train: posts that the fitted baselines learn from, the same the adapter learned from;
            without any, those baselines are left out and a note says so.
        plan: what is measured.

    Raises:
        ConfigError: a post is among the training posts too, or cannot be answered.
    """
    posts = chosen.posts
    notes: list[str] = []
    _check_apart(posts, train)
    cells = _sweep(model, posts, plan)
    baselines: dict[str, Sequence[Prediction]] = {}
    shuffled = written = None
    if plan.has_baselines:
        baselines |= _fitted(model.structure, posts, train, plan, notes)
        baselines |= _one_sided(model, posts, notes)
        shuffled = _shuffled(model, posts, plan, notes)
        written = model.write(posts)
    return Evaluation(
        structure=model.structure,
        posts=posts,
        skipped=chosen.skipped,
        plan=plan,
        cells=cells,
        baselines=baselines,
        shuffled=shuffled,
        written=written,
        notes=notes,
    )


def _check_apart(posts: Sequence[Post], train: Sequence[Post]) -> None:
    # Two sources may number their posts alike; the same post has the same text too.
    learned = {(post.id, post.text) for post in train}
    both = [post.id for post in posts if (post.id, post.text) in learned]
    if both:
        raise ConfigError(
            f"{len(both)} posts, e.g. {both[0]!r}, are among the training posts too: figures "
            "would flatter; name other posts with --split, --train-split or --train-data",
            param="split",
        )


def _sweep(model: EvaluatedModel, posts: Sequence[Post], plan: Plan) -> list[Cell]:
    """At ratio 1.0 every selector keeps all patches: asked once."""
    whole = model.label(posts, ratio=1.0, selector=plan.selectors[0], title="all visual tokens")
    cells = []
    for selector in plan.selectors:
        for ratio in plan.ratios:
            found = whole
            if ratio != 1.0:
                title = f"{selector} {ratio:g}"
                found = model.label(posts, ratio=ratio, selector=selector, title=title)
            cells.append(Cell(selector=selector, ratio=ratio, predictions=found))
    return cells


def _fitted(
    structure: LabelStructure,
    posts: Sequence[Post],
    train: Sequence[Post],
    plan: Plan,
    notes: list[str],
) -> dict[str, Sequence[Prediction]]:
    """Baselines that learn from the training posts."""
    if not any(list(structure.fields)[-1] in post.labels for post in train):
        notes.append("No training posts with labels: no majority, perfect-label or TF-IDF baseline")
        return {}
    found: dict[str, Sequence[Prediction]] = {"majority": majority(structure, train, posts)}
    for known in ("text", "image"):
        answers = perfect_label(structure, train, posts, known=known)
        if answers is not None:
            found[f"perfect {known} label"] = answers
    fitted = tfidf(structure, train, posts, seed=plan.seed)
    if fitted is None:
        notes.append("The training texts have no words: no TF-IDF baseline")
    else:
        found["tf-idf"] = fitted[0]
        notes.append(f"TF-IDF with logistic regression: {fitted[1]}")
    return found


def _one_sided(
    model: EvaluatedModel, posts: Sequence[Post], notes: list[str]
) -> dict[str, Sequence[Prediction]]:
    """The model with half of its input, and the base model without the adapter."""
    found: dict[str, Sequence[Prediction]] = {}

    def ask(name: str, one: EvaluatedModel, inputs: Sequence[Post]) -> None:
        found[name] = one.label(inputs, ratio=1.0, selector="cls", title=name)

    if any(post.images for post in posts):
        ask("text only", model, [replace(post, images=()) for post in posts])
        ask("image only", model, [replace(post, text="") for post in posts])
    base = model.without_adapter()
    if base is None:
        notes.append("There is no adapter: the model is the zero-shot base itself")
    else:
        ask("zero-shot base", base, posts)
    return found


def _shuffled(
    model: EvaluatedModel, posts: Sequence[Post], plan: Plan, notes: list[str]
) -> Sequence[Prediction] | None:
    """Each text with another post's images: what the model still gets right, images do not give."""
    if sum(bool(post.images) for post in posts) < 2:
        notes.append("Fewer than 2 posts have images: no shuffled-image control")
        return None
    others = with_other_images(posts, "shuffled", plan.seed)
    return model.label(others, ratio=1.0, selector="cls", title="shuffled images")
