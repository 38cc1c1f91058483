"""An adapter on another data set, without training there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.errors import ConfigError
from serving.posts import Post, read_posts
from train.baselines import majority, tfidf
from train.evaluation import choose_posts
from train.material import parse_fields
from train.metrics import Marked, count_labels
from train.studies.cells import Cell, Result
from train.studies.findings import (
    ARM_HEADERS,
    Findings,
    Plot,
    Table,
    arm_row,
    conclude_floor,
    point,
    said,
)
from train.studies.lab import as_answers
from train.studies.setup import Setup, digest_posts
from train.studies.spread import summarize_seeds
from train.studies.study import Results, Study, ask_name, compare_arms, run_name

ADAPTER, BASE, MAJORITY = "adapter", "zero-shot base", "majority"


class TransferStudy(Study):
    """Adapters trained at home answer posts from away; beside them what needs no adapter."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        options = setup.options
        if options.to is None:
            raise ConfigError("study transfer needs --to, the other data set", param="to")
        chosen = choose_posts(
            setup.structure,
            self._read(options.to_split, options.limit),
            skip_unlabelled=options.skip_unlabelled,
            skip_broken=options.skip_broken,
        )
        self._away, self._skipped = chosen.posts, chosen.skipped
        self._away_train: Sequence[Post] = ()
        if options.to_train_split:
            self._away_train = self._usable(self._read(options.to_train_split, None))
        both = {post.id for post in self._away} & {post.id for post in self._away_train}
        if both:
            raise ConfigError(
                f"--to-train-split and --to-split share {len(both)} posts, e.g. {min(both)!r}",
                param="to_train_split",
            )
        self._names = setup.material.source.get("source", "home"), options.to.name

    def _read(self, split: str, limit: int | None) -> list[Post]:
        options, structure = self.setup.options, self.setup.structure
        assert options.to is not None
        found = read_posts(
            options.to,
            split=None if split == "all" else split,
            fields=parse_fields(options.to_fields),
            structure=structure,
        )
        return (
            [post for _, post in zip(range(limit), found, strict=False)] if limit else list(found)
        )

    def _usable(self, posts: Sequence[Post]) -> list[Post]:
        """Posts that teach: no label outside the structure, and one of the field that counts."""
        fields = self.setup.structure.fields
        return [
            post
            for post in posts
            if self.setup.field in post.labels
            and all(post.labels.get(name, labels[0]) in labels for name, labels in fields.items())
        ]

    def facts(self) -> dict[str, Any]:
        """The other data set."""
        options = self.setup.options
        return {
            "to": {
                "source": self._names[1],
                "splits": {"answered": options.to_split, "train": options.to_train_split},
                "posts": len(self._away),
                "labels": count_labels(self.setup.structure, self._away),
                "left_out": self._skipped,
                "train_posts": len(self._away_train),
                "digest": digest_posts([*self._away, *self._away_train]),
            }
        }

    def cells(self) -> list[Cell]:
        """The base and TF-IDF away; then by seed a training, home and away."""
        cells = [self.ask_cell("ask-base", None, posts=self._away)]
        for where in self._fitted_on():
            cells.append(Cell(name=f"fit-tfidf-{where}", kind="baseline", work=self._tfidf(where)))
        for seed in self.setup.seeds:
            run = run_name(ADAPTER, seed)
            cells += [
                self.train_cell(ADAPTER, seed, self.setup.recipe),
                self.ask_cell(ask_name("home", seed), run),
                self.ask_cell(ask_name("away", seed), run, posts=self._away),
            ]
        return cells

    def _fitted_on(self) -> list[str]:
        return ["home", "away"] if self._away_train else ["home"]

    def _tfidf(self, where: str) -> Any:
        train = self.setup.material.train if where == "home" else self._away_train

        def work() -> dict[str, Any]:
            found = tfidf(self.setup.structure, train, self._away)
            if found is None or self.setup.field not in found[0][0].labels:
                return {"answers": {}, "chosen": "its training texts teach nothing"}
            return {**as_answers(found[0]), "chosen": found[1]}

        return work

    def _marked_away(self, result: Result) -> Marked:
        return self.marked(result, posts=self._away)

    def _constant(self) -> Marked:
        """The other set's most frequent label."""
        train = self._away_train or self._away
        return self._marked_away(as_answers(majority(self.setup.structure, train, self._away)))

    def find(self, results: Results) -> Findings:
        """Away, beside what needs no adapter; and home."""
        home, away = self._names
        seeds = self.setup.seeds
        arms = {ADAPTER: [self._marked_away(results[ask_name("away", seed)]) for seed in seeds]}
        beside = {BASE: self._marked_away(results["ask-base"]), MAJORITY: self._constant()}
        for where, source in (("home", home), ("away", away)):
            fitted = results.get(f"fit-tfidf-{where}")
            if fitted and fitted["answers"]:
                beside[f"TF-IDF trained on {source} ({where})"] = self._marked_away(fitted)
        against = [(ADAPTER, name) for name in beside]
        figures, rows, lines = compare_arms(
            self, arms | {name: [one] for name, one in beside.items()}, {}, against
        )
        at_home = summarize_seeds([self.marked(results[ask_name("home", seed)]) for seed in seeds])
        figures["home"] = {ADAPTER: at_home, MAJORITY: summarize_seeds([self.majority()])}
        arm = figures["arms"][ADAPTER]
        repeated = count_repeated(self.setup.material.train, self._away)
        return Findings(
            question=f"An adapter a seed, trained on {home}, answers {len(self._away)} posts of "
            f"{away} (split {self.setup.options.to_split}) without training there.",
            tables=[
                Table(
                    title=f"On {away}",
                    headers=ARM_HEADERS,
                    rows=rows,
                    legend=self._legend(results),
                ),
                Table(
                    title=f"On {home}, for comparison",
                    headers=ARM_HEADERS,
                    rows=[arm_row(name, one) for name, one in figures["home"].items()],
                ),
            ],
            conclusions=[
                f"From {home} to {away} macro-F1 goes from {said(at_home['macro_f1'])} to "
                f"{said(arm['macro_f1'])}; these are other posts with other label shares, so the "
                "two are not tested against each other",
                *lines,
                *conclude_floor({ADAPTER: arm}, figures["arms"][MAJORITY]),
            ],
            limits=[
                f"{repeated} of the {len(self._away)} posts of {away} have the very text of a "
                f"training post of {home}"
                + ("; they flatter the transfer." if repeated else ", so none is known by it."),
                "Two data sets may mean different things by the same label.",
            ],
            figures=figures,
            plots=[
                Plot(
                    name="transfer",
                    across="answers of",
                    up=f"macro-F1 of {self.setup.field}",
                    lines={
                        f"away, on {away}": [
                            point(name, one) for name, one in figures["arms"].items()
                        ],
                        f"home, on {home}": [
                            point(name, one) for name, one in figures["home"].items()
                        ],
                    },
                )
            ],
            num_comparisons=len(against),
            num_posts=len(self._away),
        )

    def _legend(self, results: Results) -> str:
        where = "its training posts" if self._away_train else "the answered posts themselves"
        chosen = "; ".join(
            f"TF-IDF ({name}): {results[f'fit-tfidf-{name}']['chosen']}"
            for name in self._fitted_on()
        )
        return f"Majority: the most frequent label of {where}. {chosen}."


def count_repeated(train: Sequence[Post], posts: Sequence[Post]) -> int:
    """Posts whose text is, but for space, that of a training post."""
    known = {" ".join(post.text.split()) for post in train} - {""}
    return sum(" ".join(post.text.split()) in known for post in posts)


STUDY = TransferStudy
