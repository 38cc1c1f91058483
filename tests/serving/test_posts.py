"""Readers: every layout gives the same posts, whatever the encoding, and says where it is wrong."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.errors import ConfigError
from serving.posts import (
    LAYOUTS,
    Post,
    Posts,
    known_splits,
    merge_labels,
    read_posts,
    read_text,
)
from serving.structures import SENTIMENTS

ROOT = Path(__file__).parents[2]
MVSA = Path(os.environ.get("SIEVE_MVSA", ROOT / "../shared/mvsa/MVSA_Single"))
IMAGE = b"not decoded here"
TEXTS = {"1": "plain", "2": "naïve “quotes”", "10": "日本 🙂"}


def write_mvsa(folder: Path, rows: str, header: str = "ID\ttext,image\n") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "labelResultAll.txt").write_text(header + rows)
    return folder


def as_mvsa(folder: Path) -> Path:
    write_mvsa(folder, "".join(f"{id_}\tneutral,positive\n" for id_ in TEXTS))
    return as_pairs(folder / "data").parent


def as_pairs(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for id_, text in TEXTS.items():
        (folder / f"{id_}.txt").write_text(text + "\n", encoding="utf-8")
        (folder / f"{id_}.jpg").write_bytes(IMAGE)
    return folder


def as_jsonl(folder: Path) -> Path:
    as_pairs(folder)
    rows = [{"id": id_, "text": text, "image": f"{id_}.jpg"} for id_, text in TEXTS.items()]
    path = folder / "posts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def as_csv(folder: Path) -> Path:
    as_pairs(folder)
    path = folder / "posts.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "id", "image"])
        rows.writerows([text, id_, f"{id_}.jpg"] for id_, text in TEXTS.items())
    return path


def as_parquet(folder: Path) -> Path:
    as_pairs(folder)
    images = [f"{id_}.jpg" for id_ in TEXTS]
    columns = {"text": [*TEXTS.values()], "image": images, "id": [*TEXTS]}
    pq.write_table(pa.table(columns), folder / "posts.parquet")
    return folder / "posts.parquet"


def as_llava(folder: Path) -> Path:
    as_pairs(folder)
    rows = [
        {
            "id": id_,
            "image": f"{id_}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{text}"},
                {"from": "gpt", "value": "It is positive."},
            ],
        }
        for id_, text in TEXTS.items()
    ]
    return written(folder / "posts.json", json.dumps(rows))


def as_twitter(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    rows = ["index\t#1 Label\t#2 ImageID\t#3 String\t#3 String"]
    for id_ in TEXTS:
        rows.append(f"{id_}\t2\t{id_}.jpg\tmeeting $T$ today\tAnn Lee")
        (folder / "images" / f"{id_}.jpg").write_bytes(IMAGE)
    written(folder / "train.tsv", "\n".join(rows) + "\n")
    return folder


def as_openai(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    rows = [
        {
            "custom_id": id_,
            "method": "POST",
            "url": "/v1/label",
            "body": {"text": text, "image": url},
        }
        for id_, text in TEXTS.items()
    ]
    return written(folder / "posts.jsonl", "\n".join(map(json.dumps, rows)))


WAYS: list[Callable[[Path], Path]] = [as_mvsa, as_pairs, as_jsonl, as_csv, as_parquet, as_llava]
ALL_WAYS = [*WAYS, as_twitter, as_openai]  # whose texts, ids or images are of another kind


def test_every_layout_is_written_by_a_test(tmp_path: Path) -> None:
    found = {type(read_posts(way(tmp_path / way.__name__))) for way in ALL_WAYS}
    assert found == set(LAYOUTS)


@pytest.mark.parametrize("way", ALL_WAYS)
def test_a_split_works_in_every_layout_by_name_and_by_path(
    way: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = way(tmp_path / "data")
    ids = [post.id for post in read_posts(source)]
    folder = source if source.is_dir() else source.parent
    splits: list[tuple[Path, str | Path]] = [
        (folder / "mine_ids.txt", "mine"),
        (tmp_path / "m.txt", tmp_path / "m.txt"),
    ]
    for path, split in splits:
        path.write_text(f"{ids[2]}\r\n\n{ids[0]}\n")
        posts = read_posts(source, split=split)
        assert [post.id for post in posts] == [ids[0], ids[2]] == [post.id for post in posts]
        assert posts.num_posts == 2
    assert known_splits(source)[-1] == "mine"


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (None, ["'dev'", "no file dev_ids.txt", "splits there are"]),
        ("11\n{id}\n12\n", ["dev_ids.txt line 1", "id='11' is not in", "2 of the 3 ids"]),
        ("{id}\n{id}\n", ["dev_ids.txt line 2", "is there twice"]),
        ("\n", ["dev_ids.txt lists no id"]),
    ],
)
def test_a_split_that_cannot_be_selected_is_refused(
    way: Callable[[Path], Path], ids: str | None, says: list[str], tmp_path: Path
) -> None:
    source = way(tmp_path)
    folder = source if source.is_dir() else source.parent
    if ids is not None:
        (folder / "dev_ids.txt").write_text(ids.format(id=next(iter(read_posts(source))).id))
    with pytest.raises(ConfigError) as caught:
        list(read_posts(source, split="dev"))
    assert all(part in caught.value.message for part in says), caught.value.message


@pytest.mark.parametrize("way", [*WAYS, as_openai])
def test_layouts_agree_on_ids_texts_and_images(way: Callable[[Path], Path], tmp_path: Path) -> None:
    posts = read_posts(way(tmp_path))
    for _ in range(2):  # every iteration reads anew
        assert {post.id: post.text for post in posts} == TEXTS
        assert [post.id for post in posts] == list(TEXTS)
        assert all(post.image_bytes() == [IMAGE] for post in posts)
        assert posts.num_not_utf8 == 0
    assert posts.num_posts in (None, len(TEXTS))


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_image_file_is_the_posts_error_not_the_readers(
    way: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = way(tmp_path)
    posts = iter(read_posts(source))
    next(tmp_path.rglob("1.jpg")).unlink()
    post = next(posts)
    assert post.id == "1"
    assert post.images
    with pytest.raises(FileNotFoundError):
        post.image_bytes()


@pytest.mark.parametrize(
    ("raw", "text", "is_odd"),
    [
        ("naïve 🙂".encode(), "naïve 🙂", False),
        ("\ufeffwith a mark\r\n".encode(), "with a mark", False),
        ("it’s – naïve".encode("cp1252"), "it’s – naïve", True),
        (b"caf\xe9 \x81", "café \x81", True),  # 0x81 is in latin-1 only
        (b"", "", False),
    ],
)
def test_any_bytes_are_a_text(raw: bytes, text: str, is_odd: bool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt") == (text, is_odd)


def odd_pairs(folder: Path, texts: list[bytes]) -> Path:
    for number, raw in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(raw)
    return folder


def odd_jsonl(folder: Path, texts: list[bytes]) -> Path:
    path = folder / "p.jsonl"
    path.write_bytes(b"\n".join(b'{"text": "' + raw + b'"}' for raw in texts))
    return path


def odd_csv(folder: Path, texts: list[bytes]) -> Path:
    path = folder / "p.csv"
    path.write_bytes(b"text\r\n" + b"\r\n".join(b'"' + raw + b'"' for raw in texts))
    return path


@pytest.mark.parametrize("write", [odd_pairs, odd_jsonl, odd_csv])
def test_texts_that_are_not_utf8_are_read_and_counted(
    write: Callable[[Path, list[bytes]], Path], tmp_path: Path
) -> None:
    texts = ["naïve".encode(), "naïve".encode("latin-1"), b"plain", "“hm”".encode("cp1252")]
    posts = read_posts(write(tmp_path, texts))
    assert [post.text for post in posts] == ["naïve", "naïve", "plain", "“hm”"]
    assert posts.num_not_utf8 == 2


def test_a_csv_text_of_several_lines_is_one_post_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'text\n"caf\xe9\n  caf\xe9"\nplain\n')
    posts = read_posts(path)
    assert [post.text for post in posts] == ["café\n  café", "plain"]
    assert posts.num_not_utf8 == 1


def test_half_an_emoji_becomes_a_question_mark_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "cut \\uD83D"}\n{"text": "whole \\ud83d\\ude42"}\n')
    posts = read_posts(path)
    assert [post.text for post in posts] == ["cut ?", "whole 🙂"]
    assert posts.num_not_utf8 == 1


def test_an_image_or_a_text_alone_is_a_post(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").write_bytes(IMAGE)
    (tmp_path / "b.txt").write_text("hello")
    (tmp_path / "notes.md").write_text("neither")
    (tmp_path / ".hidden.txt").write_text("neither")
    first, second = read_posts(tmp_path)
    assert (first.id, first.text, first.image_bytes()) == ("a", "", [IMAGE])
    assert second == Post(id="b", text="hello")


def test_folder_posts_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("b2", "10", "9", "b10", "a"):
        (tmp_path / f"{name}.txt").touch()
    assert [post.id for post in read_posts(tmp_path)] == ["9", "10", "a", "b2", "b10"]


def test_mvsa_columns_are_text_then_image_and_merged_as_published(tmp_path: Path) -> None:
    pairs = [(text, image) for text in SENTIMENTS for image in SENTIMENTS]
    rows = "".join(f"{text}-{image}\t{text},{image}\n" for text, image in pairs)
    for post in read_posts(write_mvsa(tmp_path, rows)):
        text, image = post.id.split("-")
        assert (post.labels["text"], post.labels["image"]) == (text, image)
        if {text, image} == {"positive", "negative"}:
            assert set(post.labels) == {"text", "image"}
        else:
            merged = merge_labels(image, text)
            assert post.labels["multimodal"] == post.labels["sentiment"] == merged


def test_jsonl_takes_several_images_data_urls_and_labels(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    url = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    rows = [
        {"id": 7, "images": ["a.jpg", url], "labels": {"image": "neutral", "text": None}},
        {"text": None, "image": url},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_posts(path)
    assert (first.id, first.image_bytes(), first.labels) == (
        "7",
        [IMAGE, b"inline"],
        {"image": "neutral"},
    )
    assert (second.id, second.text, second.image_bytes()) == ("2", "", [b"inline"])


def test_csv_reads_labels_and_takes_empty_cells_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('text,labels.sentiment,labels.image\n"a, b",positive,\n,,neutral\n')
    first, second = read_posts(path)
    assert first == Post(id="2", text="a, b", labels={"sentiment": "positive"})
    assert second == Post(id="3", labels={"image": "neutral"})


def jsonl(*lines: str) -> Callable[[Path], Path]:
    return lambda folder: written(folder / "p.jsonl", "\n".join(lines))


def table(text: str) -> Callable[[Path], Path]:
    return lambda folder: written(folder / "p.csv", text)


def mvsa(rows: str, header: str = "ID\ttext,image\n") -> Callable[[Path], Path]:
    return lambda folder: write_mvsa(folder, rows, header)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GOOD = '{"id": "1", "text": "a"}'


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (jsonl(GOOD, "", "{oops"), ["line 3", "{oops", "JSON"]),
        (jsonl(GOOD, "[1]"), ["line 2", "[1]", "not an object"]),
        (jsonl(GOOD, GOOD), ["line 2", "'1'", "twice"]),
        (jsonl('{"id": "1"}'), ["line 1", "text, image or images"]),
        (jsonl('{"txt": "a", "image": "b"}'), ["line 1", "'txt'", "allowed are id, text"]),
        (jsonl('{"text": 5}'), ["line 1", "text=5", "string"]),
        (jsonl('{"text": "a", "id": true}'), ["line 1", "True"]),
        (jsonl('{"text": "a", "labels": {"sentiment": 1}}'), ["line 1", "labels.sentiment=1"]),
        (jsonl('{"image": "a", "images": ["b"]}'), ["line 1", "exclude each other"]),
        (jsonl('{"image": "https://e.org/a.jpg"}'), ["line 1", "https://", "data URL"]),
        (table("id,txt\n1,a\n"), ["line 1", "txt", "allowed are id, text, image"]),
        (table("id,labels.x\n1,a\n"), ["line 1", "text or image"]),
        (table("text,text\na,b\n"), ["line 1", "each once"]),
        (table(""), ["line 1", "columns []"]),
        (table("id,text\n1,a\n2\n"), ["line 3", "1 cells", "has 2"]),
        (table("id,text\n1,a\n1,b\n"), ["line 3", "'1'", "twice"]),
        (table('id,text\n1,"a"b\n'), ["line 2", "CSV"]),
        (mvsa("1\tpositive,glad\n"), ["line 2", "glad", "neutral"]),
        (mvsa("1\tpositive\n"), ["line 2", "ID<tab>text,image"]),
        (mvsa("1\tneutral,neutral\n1\tneutral,neutral\n"), ["line 3", "'1'", "twice"]),
        (mvsa("1\tneutral,neutral\n", header="\n"), ["line 2", "header in line 1"]),
        (mvsa("1\tneutral,neutral\n", header=""), ["line 1", "header"]),
        (mvsa("", header="ID\timage,text\n"), ["line 1", "header"]),
    ],
)
def test_a_mistake_in_the_data_is_named_with_its_line(
    write: Callable[[Path], Path], says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        list(read_posts(write(tmp_path)))
    assert all(part in caught.value.message for part in says), caught.value.message


def empty(folder: Path) -> Path:
    return folder


def absent(folder: Path) -> Path:
    return folder / "absent"


def text_file(folder: Path) -> Path:
    return written(folder / "posts.xml", "<a/>")


@pytest.mark.parametrize("make", [empty, text_file])
def test_an_unknown_layout_names_all_that_are_known(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_posts(make(tmp_path))
    assert all(layout.description in caught.value.message for layout in LAYOUTS)


def test_a_source_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_posts(absent(tmp_path))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.png").touch()
    with pytest.raises(ConfigError, match=r"'a' is there twice.*JSONL"):
        read_posts(tmp_path)


def test_rows_are_read_only_as_they_are_asked_for(tmp_path: Path) -> None:
    posts: Iterator[Post] = iter(read_posts(jsonl(GOOD, "{broken")(tmp_path)))
    assert next(posts).text == "a"
    with pytest.raises(ConfigError, match="line 2"):
        next(posts)


def test_a_csv_field_over_the_modules_limit_is_named_with_its_line(tmp_path: Path) -> None:
    huge = io.StringIO()
    csv.writer(huge).writerows([["text"], ["a"], ["x" * (csv.field_size_limit() + 1)]])
    with pytest.raises(ConfigError, match=r"line 3: is not CSV: field larger"):
        list(read_posts(table(huge.getvalue())(tmp_path)))


@pytest.fixture
def real() -> Path:
    if not (MVSA / "labelResultAll.txt").is_file():
        pytest.skip("no MVSA-Single here; SIEVE_MVSA names its folder")
    return MVSA


@pytest.mark.mvsa
def test_mvsa_single_is_read_whole(real: Path) -> None:
    posts: Posts = read_posts(real)
    read = list(posts)
    assert len(read) == posts.num_posts == 4061
    assert 0.22 < posts.num_not_utf8 / len(read) < 0.26
    assert all(post.labels["sentiment"] in SENTIMENTS for post in read)
    assert all(path.is_file() for post in read for path in post.images if isinstance(path, Path))


@pytest.mark.mvsa
def test_mvsa_single_splits_share_no_post_and_make_the_whole(real: Path) -> None:
    ids = [{post.id for post in read_posts(real, split=split)} for split in ("train", "dev", None)]
    if not (real / "dev_ids.txt").is_file():
        pytest.skip("no splits beside the data")
    train, dev, whole = ids
    assert not train & dev
    assert train | dev == whole
