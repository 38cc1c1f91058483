"""Splits: the seed paper's numbers, the same whatever the order of reading, never half written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from serving.errors import ConfigError
from serving.posts import Post, read_posts
from train.splits import Split, k_folds, labels_by_id, stratified

PAPER = {"positive": 2683, "neutral": 470, "negative": 1358}
SMALL = {"positive": 30, "neutral": 7, "negative": 12}


def make_posts(counts: Mapping[str, int]) -> list[Post]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(labels)
    return [Post(id=str(n), labels={"multimodal": label}) for n, label in enumerate(labels)]


def class_counts(posts: list[Post], ids: tuple[str, ...]) -> dict[str, int]:
    labels = labels_by_id(posts, "multimodal")
    return dict(Counter(labels[id_] for id_ in ids))


def test_the_full_set_is_split_as_in_the_seed_paper() -> None:
    posts = make_posts(PAPER)
    split = stratified(posts, "multimodal", seed=0)
    order = ("positive", "neutral", "negative")
    found = [
        [class_counts(posts, ids)[label] for label in order]
        for ids in (split.train, split.dev, split.test)
    ]
    assert found == [[2146, 376, 1086], [268, 47, 136], [269, 47, 136]]


def parts(split: Split) -> list[set[str]]:
    return [set(split.train), set(split.dev), set(split.test)]


@pytest.mark.parametrize("counts", [SMALL, PAPER, {"a": 1}, {"a": 2, "b": 3}])
@pytest.mark.parametrize("shares", [(8, 1, 1), (1, 1, 1), (9, 1, 0), (1, 0, 0), (7, 0, 3)])
def test_every_post_is_in_one_part(counts: dict[str, int], shares: tuple[int, int, int]) -> None:
    posts = make_posts(counts)
    split = stratified(posts, "multimodal", shares=shares, seed=1)
    assert sum(map(len, parts(split))) == len(posts)
    assert set.union(*parts(split)) == {post.id for post in posts}
    assert [bool(part) for part in parts(split)][1:] <= [share > 0 for share in shares[1:]]


def test_every_post_is_held_out_in_one_fold() -> None:
    posts = make_posts(SMALL)
    folds = k_folds(posts, "multimodal", k=5, seed=0)
    held_out = [id_ for fold in folds for id_ in fold.dev]
    assert sorted(held_out) == sorted(post.id for post in posts)
    for fold in folds:
        assert not set(fold.train) & set(fold.dev)
        assert len(fold.train) + len(fold.dev) == len(posts)
        assert class_counts(posts, fold.dev).keys() == SMALL.keys()
        assert not fold.test


@pytest.mark.parametrize("make", [stratified, k_folds])
def test_the_order_of_reading_changes_nothing_and_the_seed_does(make) -> None:
    posts = make_posts(SMALL)
    shuffled = random.Random(1).sample(posts, len(posts))
    assert make(posts, "multimodal", seed=3) == make(shuffled, "multimodal", seed=3)
    assert make(posts, "multimodal", seed=3) != make(posts, "multimodal", seed=4)


PRINT = """
from serving.posts import Post
from train.splits import k_folds, stratified
posts = [Post(id=f"p{n}", labels={"y": "ab"[n % 3 > 0]}) for n in range(60)]
print(stratified(posts, "y", seed=5), k_folds(posts, "y", k=3, seed=5))
"""


def test_another_process_draws_the_same_split() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_a_split_drawn_before_stays_as_it_was() -> None:
    split = stratified(make_posts({"a": 10, "b": 5}), "multimodal", seed=0)
    assert split.dev + split.test == DRAWN


DRAWN = ("7", "14", "6")


def test_posts_without_the_label_are_in_no_part() -> None:
    posts = [*make_posts(SMALL), Post(id="none", labels={"text": "neutral"}), Post(id="nothing")]
    for split in (stratified(posts, "multimodal"), *k_folds(posts, "multimodal")):
        assert not {"none", "nothing"} & set.union(*parts(split))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda posts: stratified(posts, "sentiment"), r"'sentiment'.*fields there are \['multimo"),
        (lambda posts: stratified(posts, "multimodal", shares=(0, 1, 1)), r"shares=\(0, 1, 1\)"),
        (lambda posts: stratified(posts, "multimodal", shares=(8, -1, 1)), "shares"),
        (lambda posts: k_folds(posts, "multimodal", k=1), "folds=1 must be 2"),
        (lambda posts: k_folds(posts, "multimodal", k=8), "folds=8: 7 posts have .*'neutral'"),
    ],
)
def test_what_cannot_be_split_is_refused(make, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(make_posts(SMALL))


def test_lists_are_what_read_posts_takes(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("a")
    posts = [Post(id=post.id, labels={"y": "a"}) for post in read_posts(tmp_path)]
    split = stratified(posts, "y")
    names = {path.name for path in split.write(tmp_path)}
    assert names == {"train_ids.txt", "dev_ids.txt", "test_ids.txt"}
    for part, ids in split.parts.items():
        assert {post.id for post in read_posts(tmp_path, split=part)} == {*ids}
    assert split.write(tmp_path)  # the same again is no loss
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("other", ["train_ids.txt", "test_ids.txt"])
def test_lists_of_other_ids_are_never_written_over(other: str, tmp_path: Path) -> None:
    (tmp_path / other).write_text("precious\n")
    (fold, *_) = k_folds(make_posts(SMALL), "multimodal")
    with pytest.raises(ConfigError, match=f"{other} is already in"):
        fold.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [other]
    assert (tmp_path / other).read_text() == "precious\n"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def full(self: Path, data: bytes) -> int:
        if self.name.startswith(".dev"):
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        stratified(make_posts(SMALL), "multimodal").write(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("id_", ["", " a", "a\nb"])
def test_an_id_that_no_list_can_hold_is_named(id_: str, tmp_path: Path) -> None:
    split = Split(name="s", train=(id_,), dev=("b",))
    with pytest.raises(ConfigError, match="cannot stand in a list"):
        split.write(tmp_path)
    assert not list(tmp_path.iterdir())
