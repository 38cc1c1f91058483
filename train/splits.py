"""Splits: which posts train, which choose, which test; stable against the order of reading.

Posts are sorted by id and drawn by a seed, so the same posts with the same labels give the same
split on every machine, whatever the order in which they were read.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.errors import ConfigError
from serving.posts import LIST_SUFFIX, Post


@dataclass(frozen=True, kw_only=True)
class Split:
    """Ids of the posts of each part, in ascending order.

    Attributes:
        name: how the split was made, or which fold it is.
        train: what a model is fitted on.
        dev: what chooses between models, epochs and settings.
        test: what is looked at once; empty in a fold.
    """

    name: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The parts by name, without empty ones."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {part: ids for part, ids in parts.items() if ids}

    def write(self, folder: Path) -> list[Path]:
        """Writes `train_ids.txt` and so on, for `read_posts(..., split=...)`; says which.

        All are written beside their places and then renamed, so none is ever half there.

        Raises:
            ConfigError: a list of other ids is already there, an id cannot stand on a line of its
                own, or the folder cannot be written.
        """
        texts = {
            folder / f"{part}{LIST_SUFFIX}": "\n".join(map(_line, ids)) + "\n"
            for part, ids in self.parts.items()
        }
        try:
            _check_free(folder, texts)
            folder.mkdir(parents=True, exist_ok=True)
            _replace(texts)
        except OSError as error:
            raise ConfigError(
                f"split cannot be written to {str(folder)!r}: {error.strerror}", param="out"
            ) from error
        return list(texts)


def stratified(
    posts: Iterable[Post],
    field: str,
    *,
    shares: tuple[int, int, int] = (8, 1, 1),
    seed: int = 0,
) -> Split:
    """Train, dev and test with each label in about the same share.

    Of the n posts of a label, the train part gets floor(n * train / all), dev its share of the
    rest rounded down, and test what is left: the seed paper's 8:1:1 of MVSA-Single.

    Args:
        posts: posts without a label of the field are left out.
        field: the label that is to be spread evenly.
        shares: of train, dev and test.
        seed: another one draws other posts.

    Raises:
        ConfigError: the shares are not usable, or no post has the label.
    """
    if min(shares) < 0 or not shares[0]:
        raise ConfigError(f"shares={shares} must be 0 or more, and train's above 0", param="shares")
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for ids in _by_label(labels_by_id(posts, field)).values():
        num_train = len(ids) * shares[0] // sum(shares)
        rest = len(ids) - num_train
        num_dev = rest * shares[1] // max(1, shares[1] + shares[2])
        drawn = sorted(ids, key=lambda id_: _draw(seed, id_))
        parts[0].extend(drawn[:num_train])
        parts[1].extend(drawn[num_train : num_train + num_dev])
        parts[2].extend(drawn[num_train + num_dev :])
    train, dev, test = (tuple(sorted(part)) for part in parts)
    return Split(name="stratified", train=train, dev=dev, test=test)


def k_folds(posts: Iterable[Post], field: str, *, k: int = 5, seed: int = 0) -> list[Split]:
    """Every post is in dev once: k splits into train and dev, with labels in even shares.

    Args:
        posts: posts without a label of the field are left out.
        field: the label that is to be spread evenly.
        k: how many folds, 2 or more.
        seed: another one draws other folds.

    Raises:
        ConfigError: a label has fewer posts than there are folds, or no post has one.
    """
    from sklearn.model_selection import StratifiedKFold

    if k < 2:
        raise ConfigError(f"folds={k} must be 2 or more", param="folds")
    labels = labels_by_id(posts, field)
    for label, ids in _by_label(labels).items():
        if len(ids) < k:
            raise ConfigError(
                f"folds={k}: {len(ids)} posts have {field}={label!r}; allowed are up to as many "
                "folds as the rarest label has posts",
                param="folds",
            )
    ids = list(labels)
    folds = StratifiedKFold(k, shuffle=True, random_state=seed)
    return [
        Split(
            name=f"fold-{number}",
            train=tuple(ids[row] for row in train),
            dev=tuple(ids[row] for row in dev),
        )
        for number, (train, dev) in enumerate(folds.split(ids, list(labels.values())))
    ]


def labels_by_id(posts: Iterable[Post], field: str) -> dict[str, str]:
    """Label of each post that has one in the field, by ascending id.

    Raises:
        ConfigError: none has; names the fields that there are.
    """
    labels: dict[str, str] = {}
    fields: set[str] = set()
    for post in posts:
        fields.update(post.labels)
        if field in post.labels:
            labels[post.id] = post.labels[field]
    if not labels:
        raise ConfigError(
            f"field={field!r}: no post has a label of it; fields there are {sorted(fields)}",
            param="field",
        )
    return {id_: labels[id_] for id_ in sorted(labels)}


def _by_label(labels: Mapping[str, str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for id_, label in labels.items():
        groups[label].append(id_)
    return dict(sorted(groups.items()))


def _draw(seed: int, id_: str) -> bytes:
    """A post's place in the lot; by a hash, so that it hangs on nothing but the seed and the id."""
    return hashlib.blake2b(f"{seed} {id_}".encode(errors="surrogatepass"), digest_size=16).digest()


def _line(id_: str) -> str:
    if not id_ or id_ != id_.strip() or "\n" in id_:
        raise ConfigError(
            f"id={id_!r} cannot stand in a list of ids: it is empty, has space around it or a line "
            "break in it; rename it in the data"
        )
    return id_


def _check_free(folder: Path, texts: Mapping[Path, str]) -> None:
    for path in sorted(folder.glob(f"*{LIST_SUFFIX}")):
        is_ours = path.name in ("train_ids.txt", "dev_ids.txt", "test_ids.txt")
        if is_ours and path.read_bytes() != texts.get(path, "").encode(errors="surrogateescape"):
            raise ConfigError(
                f"{path.name} is already in {str(folder)!r} with other ids; name another folder",
                param="out",
            )


def _replace(texts: Mapping[Path, str]) -> None:
    partial = {path: path.with_name(f".{path.name}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partial[path].write_bytes(text.encode(errors="surrogateescape"))
        for path, whole in partial.items():
            os.replace(whole, path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
