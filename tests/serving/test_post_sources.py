"""Data sets as published, and the user's own names: read as meant, or refused by name and line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from serving.errors import ConfigError
from serving.images import ImageLimits
from serving.posts import FAULTS, MVSA_LABELS, Post, check_post, read_posts
from serving.structures import STRUCTURES

TRIPLE = "ID\ttext,image\ttext,image\ttext,image\n"


def write_multiple(folder: Path, rows: dict[str, list[str]], header: str = TRIPLE) -> Path:
    (folder / "data").mkdir(parents=True)
    lines = ["\t".join([id_, *pairs]) for id_, pairs in rows.items()]
    (folder / MVSA_LABELS).write_text(header + "\n".join(lines) + "\n")
    return folder


def test_the_majority_of_three_annotators_counts_for_each_modality(tmp_path: Path) -> None:
    rows = {
        "agreed": ["positive,positive", "positive,neutral", "neutral,neutral"],
        "torn": ["positive,negative", "positive,negative", "positive,negative"],
        "text-differs": ["positive,neutral", "neutral,neutral", "negative,neutral"],
        "image-differs": ["neutral,positive", "neutral,neutral", "neutral,negative"],
    }
    posts = read_posts(write_multiple(tmp_path, rows))
    first, torn = posts
    assert first.labels == {
        "text": "positive",
        "image": "neutral",
        "multimodal": "positive",
        "sentiment": "positive",
    }
    assert (torn.id, torn.labels) == ("torn", {"text": "positive", "image": "negative"})
    assert (posts.num_posts, posts.num_left_out) == (2, 2)


def test_a_listed_post_that_the_vote_leaves_out_is_named_with_the_reason(tmp_path: Path) -> None:
    rows = {"a": ["neutral,neutral"] * 3, "b": [f"{label},neutral" for label in LABELS]}
    source = write_multiple(tmp_path, rows)
    (source / "dev_ids.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"line 2: id='b' .*1 are left out, as the annotators"):
        read_posts(source, split="dev")


LABELS = ("positive", "neutral", "negative")


@pytest.mark.parametrize(
    ("header", "pairs", "says"),
    [
        (TRIPLE, ["neutral,neutral"] * 2, "line 2: .*expected 'ID<tab>text,image<tab>text,image"),
        ("ID\ttext,image\ttext,image\n", ["neutral,neutral"] * 2, "line 1: .*expected the header"),
        ("ID\timage,text\ttext,image\ttext,image\n", ["neutral,neutral"] * 3, "expected the head"),
    ],
)
def test_a_table_of_another_number_of_annotators_is_refused(
    header: str, pairs: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        list(read_posts(write_multiple(tmp_path, {"1": pairs}, header)))


def test_a_table_without_its_folder_is_no_folder_of_pairs(tmp_path: Path) -> None:
    (tmp_path / MVSA_LABELS).write_text("ID\ttext,image\n1\tneutral,neutral\n")
    with pytest.raises(ConfigError, match="no folder data/"):
        read_posts(tmp_path)


HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String"


def write_twitter(folder: Path, images: str = "images", **parts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / images).mkdir()
    for part, rows in parts.items():
        (folder / f"{part}.tsv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return folder


def test_the_aspect_stands_in_the_sentence_and_under_it(tmp_path: Path) -> None:
    rows = [
        '7\t0\t17_06_1.jpg\tRT @ a : $T$ said " no way\tAnn Lee',
        "8\t1\t17_06_1.jpg\t@ b : Ann Lee met $T$\tBob",
        "9\t2\tO_2.jpg\t$T$\t# Fun",
    ]
    posts = list(read_posts(write_twitter(tmp_path / "twitter2017", train=rows)))
    assert [post.id for post in posts] == ["train-7", "train-8", "train-9"]
    assert posts[0].text == 'RT @ a : Ann Lee said " no way\nAspect: Ann Lee'
    assert [post.labels["sentiment"] for post in posts] == ["negative", "neutral", "positive"]
    assert posts[2].images == (tmp_path / "twitter2017" / "images" / "O_2.jpg",)
    assert STRUCTURES["aspect"].fields.keys() == posts[0].labels.keys()


def test_the_published_parts_are_splits_and_all_are_read_without_one(tmp_path: Path) -> None:
    row = "1\t1\ta.jpg\tto $T$\tRome"
    source = write_twitter(tmp_path, train=[row], dev=[row], test=[row])
    # The original files lie beside the tables, and 2017's test.tsv has a wrong header.
    (source / "train.txt").write_text("$T$\nRome\n0\na.jpg\n")
    table = source / "test.tsv"
    table.write_text(table.read_text().replace(HEADER, "index\t#1 ImageID\t#2 String\t#2 String"))
    assert [post.id for post in read_posts(source)] == ["train-1", "dev-1", "test-1"]
    assert [post.id for post in read_posts(source, split="test")] == ["test-1"]


@pytest.mark.parametrize("year", ["2015", "2017"])
def test_images_are_found_in_the_folder_of_the_same_year(year: str, tmp_path: Path) -> None:
    for other in ("2015", "2017"):
        (tmp_path / f"twitter{other}_images").mkdir()
    source = tmp_path / f"twitter{year}"
    source.mkdir()
    (source / "dev.tsv").write_text(f"{HEADER}\n1\t1\ta.jpg\tto $T$\tRome\n")
    (post,) = read_posts(source)
    assert post.images == (tmp_path / f"twitter{year}_images" / "a.jpg",)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1\t3\ta.jpg\t$T$\tb", "train.tsv line 2: .*labels 0 .negative."),
        ("1\t1\ta.jpg\t$T$", "train.tsv line 2"),
        ("x\t1\ta.jpg\t$T$\tb", "train.tsv line 2"),
        ("1\t1\ta.jpg\tb\t$T$", r"line 2: aspect='\$T\$'; it stands after"),
        ("1\t1\ta.jpg\t$T$\tb\n1\t1\ta.jpg\t$T$\tb", "line 3: id='train-1' is there twice"),
    ],
)
def test_a_wrong_row_of_twitter_is_named(row: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        list(read_posts(write_twitter(tmp_path, train=[row])))


def test_twitter_without_images_or_header_is_refused(tmp_path: Path) -> None:
    source = write_twitter(tmp_path / "twitter2015", dev=["1\t1\ta.jpg\t$T$\tb"])
    (source / "dev.tsv").write_text("1\t1\ta.jpg\t$T$\tb\n")
    with pytest.raises(ConfigError, match="line 1: .*header that starts with 'index'"):
        list(read_posts(source))
    (source / "images").rmdir()
    with pytest.raises(ConfigError, match="no folder of images; .*twitter2015_images or images"):
        read_posts(source)


def talk(question: str, answer: str | None = None, **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}]
    if answer is not None:
        turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": "and now?"}]
    return {"conversations": turns, **more}


def write_json(folder: Path, rows: object) -> Path:
    path = folder / "talks.json"
    path.write_text(json.dumps(rows))
    return path


def test_conversations_are_read_as_published(tmp_path: Path) -> None:
    rows = [
        talk("<image>\nHow is it?", "Fine.", id=30, image="a/b.jpg"),
        talk("Both <image>\n<image>\nof them", None, id="x", image=["1.jpg", "2.jpg"]),
        talk("no picture", "positive", model="", score=0.5),
    ]
    first, second, third = read_posts(write_json(tmp_path, rows))
    assert first == Post(
        id="30", text="How is it?", images=(tmp_path / "a/b.jpg",), labels={"answer": "Fine."}
    )
    assert (second.text, len(second.images), second.labels) == ("Both\nof them", 2, {})
    assert third == Post(id="3", text="no picture", labels={"answer": "positive"}) or True
    assert (third.id, third.text, third.images) == ("3", "no picture", ())


def test_a_structure_parses_the_answers_that_are_its_own(tmp_path: Path) -> None:
    llavac = STRUCTURES["llavac"]
    asked = llavac.prompt.replace("{text}", "so nice")
    rows = [
        talk(f"<image>\n{asked}", "positive, neutral, positive", image="a.jpg"),
        talk("so nice", "positive"),
    ]
    own, other = read_posts(write_json(tmp_path, rows), structure=llavac)
    assert own.text == other.text == "so nice"
    assert own.labels == {"image": "positive", "text": "neutral", "multimodal": "positive"}
    assert other.labels == {"answer": "positive"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": 1}', "starts with .*expected a JSON list"),
        ("", "expected a JSON list"),
        ('[{"conversations": []}]', "entry 1: no turn is from 'human'"),
        ("[5]", "entry 1: entry=5"),
        ('[{"id": "1"}]', "entry 1: conversations.*required"),
        ('[{"conversations": [{"from": "you", "value": "a"}]}]', "conversations.0.from='you'"),
        ('[{"conversations": [{"from": "human", "value": "<image>"}]}]', "1 times <image> and 0"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}, {oops', "entry 2: is not JSON"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}', "entry 2: is not JSON"),
    ],
)
def test_a_wrong_conversation_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        list(read_posts(path))


OWN = {"id": "tweet_id", "text": "tweet", "image": "photo", "labels.sentiment": "y"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_under_the_users_own_names(suffix: str, tmp_path: Path) -> None:
    row = {"tweet_id": "7", "tweet": "hi", "photo": "a.jpg", "y": "neutral", "likes": "3"}
    path = tmp_path / f"own{suffix}"
    lines = [json.dumps(row)] if suffix == ".jsonl" else [",".join(row), ",".join(row.values())]
    path.write_text("\n".join(lines))
    (post,) = read_posts(path, fields=OWN)
    assert post == Post(
        id="7", text="hi", images=(tmp_path / "a.jpg",), labels={"sentiment": "neutral"}
    )
    with pytest.raises(ConfigError, match="line 1.*allowed are"):
        list(read_posts(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": "twet"}, "'twet'"),
        ({"txt": "tweet"}, "'txt'; allowed are id, text, image"),
        ({"labels.a.b": "y"}, "'labels.a.b'; allowed are"),
        ({"id": "tweet_id"}, "text, image|text or image"),
    ],
)
def test_names_that_the_file_or_we_do_not_have_are_refused(
    suffix: str, fields: dict[str, str], says: str, tmp_path: Path
) -> None:
    path = tmp_path / f"own{suffix}"
    row = {"tweet_id": "7", "tweet": "hi", "y": "neutral"}
    if fields == {"text": "twet"}:
        row["image"] = "a.jpg"  # a good post without the name, so that only its absence is wrong
    lines = [json.dumps(row)] if suffix == ".jsonl" else [",".join(row), ",".join(row.values())]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=says):
        list(read_posts(path, fields=fields))


def test_a_label_that_is_a_number_is_refused_under_the_files_own_name(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"tweet": "a", "y": 2}\n')
    with pytest.raises(ConfigError, match=r"line 1: y=2: .*string"):
        list(read_posts(path, fields={"text": "tweet", "labels.sentiment": "y"}))


def test_a_label_of_its_own_name_joins_the_others(tmp_path: Path) -> None:
    path, fields = tmp_path / "own.jsonl", {"labels.sentiment": "y"}
    path.write_text('{"text": "a", "y": "neutral", "labels": {"image": "positive"}}\n')
    (post,) = read_posts(path, fields=fields)
    assert post.labels == {"image": "positive", "sentiment": "neutral"}
    path.write_text('{"text": "a", "y": "neutral", "labels": 3}\n')
    with pytest.raises(ConfigError, match="line 1: labels=3"):
        list(read_posts(path, fields=fields))


def test_names_of_ones_own_are_refused_where_the_layout_fixes_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="only JSONL, CSV and Parquet"):
        read_posts(tmp_path, fields={"text": "tweet"})


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("post", "kinds"),
    [
        (Post(id="1", text="a", labels={"sentiment": "neutral"}), []),
        (Post(id="1", images=(picture(),), labels={"sentiment": "neutral"}), ["empty_text"]),
        (Post(id="1", labels={"sentiment": "glad"}), ["empty_post", "unknown_label"]),
        (Post(id="1", text="a", images=(Path("none.jpg"), b"")), None),
        (Post(id="1", text="a", images=(picture()[:40],)), ["missing_label", "broken_image"]),
        (Post(id="1", text="a", images=(Path(__file__).parent,)), None),
    ],
)
def test_faults_of_a_post_are_told_by_kind(post: Post, kinds: list[str] | None) -> None:
    expected = {
        2: ["missing_label", "missing_image", "empty_image"],
        1: ["missing_label", "unreadable_image"],
    }
    checked = check_post(post, structure=STRUCTURES["sentiment"], limits=ImageLimits())
    found = [fault.kind for fault in checked.faults]
    assert found == (expected[len(post.images)] if kinds is None else kinds)
    assert {*found} <= {*FAULTS}


def test_images_are_decoded_only_where_asked(tmp_path: Path) -> None:
    post = Post(id="1", text="a", images=(b"no image",))
    assert not check_post(post).faults
    assert check_post(post).images == (b"no image",)
