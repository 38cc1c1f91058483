"""Entries of a source: rows that are no posts have a place and a reason, and stop nothing."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.errors import ConfigError
from serving.posts import Duplicates, Post, Posts, Unreadable, read_posts


def jsonl(folder: Path) -> Path:
    rows = ['{"id": "a", "text": "1"}', "{oops", '{"id": 7, "text": 5}', '{"id": "d", "text": "4"}']
    return written(folder / "p.jsonl", "\n".join(rows))


def table(folder: Path) -> Path:
    return written(folder / "p.csv", 'id,text\na,1\n2\nb,"x"y\nd,4\n')


def conversations(folder: Path) -> Path:
    good = [{"from": "human", "value": "hi"}]
    rows: list[object] = [
        {"id": "a", "conversations": good},
        5,
        {"id": 7, "conversations": []},
        {"id": "d", "conversations": good},
    ]
    return written(folder / "p.json", json.dumps(rows))


def mvsa(folder: Path) -> Path:
    (folder / "data").mkdir()
    for id_ in ("a", "d"):
        (folder / "data" / f"{id_}.txt").write_text(id_)
    rows = ["ID\ttext,image", "a\tneutral,neutral", "\tneutral", "7\tneutral,glad"]
    return written(folder / "labelResultAll.txt", "\n".join([*rows, "d\tneutral,neutral"])).parent


def twitter(folder: Path) -> Path:
    (folder / "images").mkdir()
    rows = ["index\tlabel", "1\t1\ta.jpg\t$T$\tA", "x", "3\t1\ta.jpg", "4\t1\ta.jpg\t$T$\tA"]
    return written(folder / "train.tsv", "\n".join(rows)).parent


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("write", "ids", "says"),
    [
        (jsonl, ["a", "line 2", "7", "d"], ["p.jsonl line 2: '{oops'", "p.jsonl line 3: text=5"]),
        (table, ["a", "line 3", "line 4", "d"], ["p.csv line 3: 1 cells", "p.csv line 4: is not"]),
        (conversations, ["a", "entry 2", "7", "d"], ["entry 2: entry=5", "entry 3: no turn is"]),
        (
            mvsa,
            ["a", "labelResultAll.txt line 3", "7", "d"],
            ["line 3: 'neutral', expected", "line 4: '7\\tneutral,glad'"],
        ),
        (
            twitter,
            ["train-1", "train.tsv line 3", "train-3", "train-4"],
            ["train.tsv line 3: ['x']", "train.tsv line 4: ['3', '1', 'a.jpg']"],
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place_and_reading_goes_on(
    write: Callable[[Path], Path], ids: list[str], says: list[str], tmp_path: Path
) -> None:
    posts = read_posts(write(tmp_path))
    entries = list(posts.entries())
    assert [entry.id for entry in entries] == ids
    assert [type(entry) for entry in entries] == [Post, Unreadable, Unreadable, Post]
    for entry, part in zip(entries[1:3], says, strict=True):
        assert isinstance(entry, Unreadable)
        assert part in entry.message
    assert pickle.loads(pickle.dumps(entries)) == entries
    reading = iter(posts)
    assert next(reading) == entries[0]
    with pytest.raises(ConfigError) as caught:
        next(reading)
    assert isinstance(entries[1], Unreadable)
    assert caught.value.message == entries[1].message


def test_a_post_of_mvsa_without_its_text_is_unreadable_and_one_by_its_image(tmp_path: Path) -> None:
    source = mvsa(tmp_path)
    rows = ["ID\ttext,image", "a\tneutral,neutral", "b\tneutral,neutral"]
    (source / "labelResultAll.txt").write_text("\n".join(rows))
    posts = read_posts(source)
    first, second = posts.entries()
    assert isinstance(first, Post)
    assert isinstance(second, Unreadable)
    assert "line 3: text 'b.txt' is not there" in second.message
    assert [(post.id, post.text) for post in posts] == [("a", "a"), ("b", "")]


def test_a_text_that_cannot_be_read_is_its_pairs_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "b.txt").write_text("b")
    first, second = read_posts(tmp_path).entries()
    assert isinstance(first, Unreadable)
    assert (first.id, second) == ("a", Post(id="b", text="b"))
    assert "text 'a.txt' cannot be read: Is a directory" in first.message


def test_an_open_quote_takes_the_rest_of_a_table_and_says_from_where(tmp_path: Path) -> None:
    first, second = read_posts(written(tmp_path / "p.csv", 'text\na\n"b\nc\n')).entries()
    assert isinstance(first, Post)
    assert isinstance(second, Unreadable)
    assert "line 4: is not CSV: unexpected end of data, from line 3 on" in second.message


def ids_of(path: Path, ids: list[str], duplicates: Duplicates) -> tuple[list[str], Posts]:
    rows = [json.dumps({"id": id_, "text": "a"}) for id_ in ids]
    written(path, "\n".join(rows))
    posts = read_posts(path, duplicates=duplicates)
    return [entry.id for entry in posts.entries()], posts


def test_the_first_of_an_id_is_kept_and_the_others_are_counted(tmp_path: Path) -> None:
    ids, posts = ids_of(tmp_path / "p.jsonl", ["a", "b", "a", "a", "c", "b"], "first")
    assert ids == ["a", "b", "c"] == [post.id for post in posts]
    assert posts.num_duplicates == 3


def test_ids_are_renamed_and_never_to_one_that_is_there(tmp_path: Path) -> None:
    ids, posts = ids_of(tmp_path / "p.jsonl", ["a", "a#2", "a", "a", "a#2", "a#3"], "rename")
    assert ids == ["a", "a#2", "a#3", "a#4", "a#2#2", "a#3#2"]
    assert posts.num_duplicates == 4
    assert [post.id for post in posts] == ids


def test_renaming_many_of_one_id_takes_linear_time(tmp_path: Path) -> None:
    ids, _ = ids_of(tmp_path / "p.jsonl", ["a"] * 20_000, "rename")
    assert ids[-1] == "a#20000"
    assert max(Counter(ids).values()) == 1


@pytest.mark.parametrize("duplicates", ["error", "first"])
def test_a_post_that_has_the_id_of_an_unreadable_place_is_not_lost(
    duplicates: Duplicates, tmp_path: Path
) -> None:
    path = written(tmp_path / "p.jsonl", '{oops\n{"id": "line 1", "text": "a"}\n')
    with pytest.raises(ConfigError, match="line 2: id='line 1' is how a row that cannot be read"):
        list(read_posts(path, duplicates=duplicates).entries())
    first, second = read_posts(path, duplicates="rename").entries()
    assert (first.id, second.id) == ("line 1", "line 1#2")
    path.write_text('{"id": "line 2", "text": "a"}\n{oops\n')
    first, second = read_posts(path, duplicates=duplicates).entries()
    assert (first.id, second.id) == ("line 2", "line 2#2")


def test_two_images_of_one_name_share_the_text_where_duplicates_are_allowed(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("text")
    renamed = read_posts(tmp_path, duplicates="rename")
    found = [(post.id, post.text, post.image_bytes()) for post in renamed]
    assert found == [("a", "text", [b"a.jpg"]), ("a#2", "text", [b"a.png"]), ("b", "", [b"b.jpg"])]
    assert (renamed.num_posts, renamed.num_duplicates) == (3, 1)
    kept = read_posts(tmp_path, duplicates="first")
    assert [post.image_bytes() for post in kept] == [[b"a.jpg"], [b"b.jpg"]]
    assert (kept.num_posts, kept.num_duplicates) == (2, 1)


def test_a_row_that_cannot_be_read_belongs_to_a_split_if_its_id_does_or_is_not_told(
    tmp_path: Path,
) -> None:
    source = jsonl(tmp_path)
    (tmp_path / "some_ids.txt").write_text("d\n")
    (tmp_path / "more_ids.txt").write_text("7\nabsent\n")
    assert [e.id for e in read_posts(source, split="some").entries()] == ["line 2", "d"]
    # Line 2 may be the one that is absent.
    assert [e.id for e in read_posts(source, split="more").entries()] == ["line 2", "7"]
