"""`python -m train data`: counts what there is, tells what is wrong, shows what leaks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from serving.posts import Post
from train.__main__ import main
from train.survey import Survey, leaks, look_at, render_labels


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


LABELS = ("positive", "neutral", "negative")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Thirty good posts in JSONL, with two lists of ids."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(30):
        (folder / f"{number}.png").write_bytes(picture(f"#0000{number + 16:02x}"))
        labels = {"sentiment": LABELS[number % 3]}
        rows.append({"id": f"p{number}", "text": f"text {number}", "image": f"{number}.png"})
        rows[-1]["labels"] = labels  # type: ignore[assignment]
    write(folder, rows)
    (folder / "train_ids.txt").write_text("".join(f"p{n}\n" for n in range(20)))
    (folder / "dev_ids.txt").write_text("".join(f"p{n}\n" for n in range(20, 30)))
    return folder / "posts.jsonl"


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_json(capsys, *arguments: object) -> dict:
    assert main(["data", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_posts_are_counted_and_good_ones_have_no_faults(data: Path, capsys) -> None:
    report = run_json(capsys, "--data", data, "--structure", "sentiment", "--check")
    (part,) = report["parts"]
    assert (part["num_posts"], part["num_images"]) == (30, 30)
    assert part["labels"] == {"sentiment": dict.fromkeys(LABELS, 10)}
    assert part["characters"] == {"mean": 6.7, "min": 6, "median": 7, "p95": 7, "max": 7}
    assert part["faults"] == {}
    assert part["repeats"] == {"texts": 0, "images": 0}
    assert report["leaks"] == []


def test_what_is_wrong_is_counted_and_named_and_stays_in_the_count(data: Path, capsys) -> None:
    rows = read(data)
    rows[0]["image"] = "gone.png"
    (data.parent / "1.png").write_bytes(b"")
    (data.parent / "2.png").write_bytes((data.parent / "2.png").read_bytes()[:50])
    rows[3]["text"] = " "
    rows[4]["labels"] = {"sentiment": "glad"}
    rows[5]["labels"] = {}
    rows[6] = {"id": "nothing", "text": None}
    rows[7]["text"] = rows[8]["text"]
    (data.parent / "9.png").write_bytes((data.parent / "10.png").read_bytes())
    write(data.parent, rows)
    report = run_json(capsys, "--data", data, "--structure", "sentiment", "--check")
    (part,) = report["parts"]
    assert part["num_posts"] == 30
    counts = {kind: fault["count"] for kind, fault in part["faults"].items()}
    assert counts == {
        "missing_image": 1,
        "empty_image": 1,
        "broken_image": 1,
        "empty_text": 1,
        "empty_post": 1,
        "missing_label": 2,
        "unknown_label": 1,
    }
    assert part["faults"]["missing_image"]["examples"] == ["p0 gone.png"]
    assert part["faults"]["unknown_label"]["examples"] == ["p4 sentiment='glad'"]
    assert part["repeats"] == {"texts": 1, "images": 1}
    assert main(["data", "--data", str(data), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "images of 0 bytes: 1 (p1 1.png)" in printed
    assert "images that the server would refuse: 1 (p2 2.png" in printed


def test_without_check_images_stay_undecoded(data: Path, capsys) -> None:
    (data.parent / "2.png").write_bytes(b"no image")
    (part,) = run_json(capsys, "--data", data)["parts"]
    assert part["faults"] == {}


def test_splits_stand_beside_each_other_with_what_leaks(data: Path, capsys) -> None:
    rows = read(data)
    rows[25]["text"] = rows[26]["text"] = rows[3]["text"]
    (data.parent / "27.png").write_bytes((data.parent / "4.png").read_bytes())
    write(data.parent, rows)
    report = run_json(capsys, "--data", data, "--split", "train,dev")
    assert [part["name"] for part in report["parts"]] == ["train", "dev"]
    assert report["leaks"] == [{"known": "train", "part": "dev", "ids": 0, "texts": 2, "images": 1}]
    assert main(["data", "--data", str(data), "--split", "train,dev"]) == 0
    printed = capsys.readouterr().out
    assert "dev in train: 0 ids, 2 texts, 1 images" in printed
    assert "splits: dev, train" in printed
    assert "positive       7    3" in printed


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        (["--make", "stratified", "--field", "sentiment"], [""]),
        (["--make", "folds", "--folds", "2", "--structure", "sentiment"], ["fold-0", "fold-1"]),
    ],
)
def test_a_split_is_made_shown_and_read_again(
    data: Path, capsys, tmp_path: Path, arguments: list[str], folders: list[str]
) -> None:
    out = tmp_path / "splits"
    report = run_json(capsys, "--data", data, *arguments, "--out", out, "--seed", 7)
    for split, folder in zip(report["splits"], folders, strict=True):
        for part in split["parts"]:
            path = out / folder / f"{part['name']}_ids.txt"
            assert str(path) in report["written"]
            (again,) = run_json(capsys, "--data", data, "--split", path)["parts"]
            assert again["labels"] == part["labels"]
            assert again["num_posts"] == part["num_posts"] > 0
        assert sum(part["num_posts"] for part in split["parts"]) == 30
        assert all(leak["ids"] == 0 for leak in split["leaks"])


def test_posts_that_no_part_can_have_are_counted(data: Path, capsys) -> None:
    rows = read(data)
    rows[5]["labels"] = {}
    write(data.parent, rows)
    arguments = ["data", "--data", str(data), "--make", "stratified", "--field", "sentiment"]
    assert main(arguments) == 0
    assert "left out: 1 posts without a label of sentiment" in capsys.readouterr().out


def test_the_users_own_names_are_mapped(tmp_path: Path, capsys) -> None:
    path = tmp_path / "own.csv"
    path.write_text("tweet,y,likes\nhello,neutral,3\n")
    fields = "text=tweet,labels.sentiment=y"
    (part,) = run_json(capsys, "--data", path, "--fields", fields)["parts"]
    assert part["labels"] == {"sentiment": {"neutral": 1}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "does not exist"),
        (["--split", "test"], "splits there are ['dev', 'train']"),
        (["--fields", "text"], "OURS=THEIRS"),
        (["--fields", "text=none"], "'none'"),
        (["--structure", "mood"], "'mood' is unknown"),
        (["--field", "mood"], "fields there are ['sentiment']"),
        (["--make", "stratified"], "--field"),
        (["--make", "stratified", "--field", "mood"], "fields there are ['sentiment']"),
        (["--make", "stratified", "--field", "sentiment", "--split", "train,dev"], "names 2"),
        (["--make", "folds", "--field", "sentiment", "--folds", "11"], "folds=11: 10 posts"),
        (["--make", "folds", "--field", "sentiment", "--folds", "1"], "--folds"),
        (["--out", "here"], "--make"),
    ],
)
def test_a_bad_flag_is_explained(data: Path, capsys, arguments: list[str], says: str) -> None:
    given = [] if "--data" in arguments else ["--data", str(data)]
    assert main(["data", *given, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_mistake_in_the_data_is_named_with_its_line(data: Path, capsys) -> None:
    with data.open("a") as file:
        file.write("{oops\n")
    assert main(["data", "--data", str(data)]) == 2
    assert "posts.jsonl line 31" in capsys.readouterr().err


def test_a_field_of_free_text_stays_small() -> None:
    survey = Survey("all")
    for number in range(3000):
        survey.add(look_at(Post(id=str(number), text="a", labels={"answer": f"says {number}"})))
    assert len(survey.labels["answer"]) == 1001
    assert sum(survey.labels["answer"].values()) == 3000
    assert len(render_labels([survey], "answer").splitlines()) < 25


def test_an_empty_part_can_be_looked_at() -> None:
    empty, other = Survey("none"), Survey("some")
    other.add(look_at(Post(id="1", text="a")))
    (leak,) = leaks([empty, other])
    assert leak.is_clean
    assert empty.characters == {}
