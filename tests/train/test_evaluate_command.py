import json

import pytest

from serving.manifest import Manifest, fingerprint
from serving.settings import DEMO
from serving.structures import STRUCTURES
from train.__main__ import main
from train.demo.dataset import demo_posts
from train.demo.export import export_mvsa

BASE, ADAPTER = DEMO / "base", DEMO / "adapters" / "llavac"
NUM_DEV = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posts") / "synthetic"
    export_mvsa(demo_posts(110, seed=3), folder)
    ids = [row.split("\t")[0] for row in (folder / "labelResultAll.txt").read_text().splitlines()]
    (folder / "dev_ids.txt").write_text("\n".join(ids[1 : NUM_DEV + 1]))
    (folder / "train_ids.txt").write_text("\n".join(ids[NUM_DEV + 1 :]))
    return folder


def evaluate(data, *more, base=BASE, adapter=ADAPTER):
    given = ["evaluate", "--data", str(data), "--threads", "1", "--resamples", "200"]
    given += ["--base", str(base)] if base else []
    given += ["--adapter", str(adapter)] if adapter else []
    return main([*given, *map(str, more)])


def test_the_demos_adapter_is_evaluated_end_to_end(data, tmp_path, capsys):
    out = tmp_path / "out"
    short = ("--ratios", "1,0.4", "--selectors", "cls,random", "--out", out)
    assert evaluate(data, *short) == 0
    table = capsys.readouterr().out
    report = json.loads((out / "evaluation.json").read_text())
    assert report["structure"] == "llavac"
    assert report["num_posts"] == NUM_DEV
    assert len(report["cells"]) == 4
    assert report["cells"][0]["fields"]["multimodal"]["accuracy"] >= 0.9
    assert report["well_formed"] > 0.9
    assert {"tf-idf", "zero-shot base", "text only"} <= set(report["baselines"])
    assert report["shuffled_images"]["lowers_the_score"]
    assert "macro-F1" in table
    assert evaluate(data, *short, "--seed", "1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def test_ids_from_a_file_and_another_training_source_are_taken(data, tmp_path, capsys):
    ids = tmp_path / "few.txt"
    ids.write_text("\n".join((data / "dev_ids.txt").read_text().split()[:5]))
    more = ("--train-data", data, "--train-split", data / "train_ids.txt", "--ratios", "1")
    assert evaluate(data, "--split", ids, *more) == 0
    assert "5 posts" in capsys.readouterr().out


def test_the_structure_of_a_run_folder_is_found(data, tmp_path, capsys):
    adapter = tmp_path / "run" / "adapter"
    copy_adapter(adapter)
    more = ("--ratios", "1", "--no-baselines", "--limit", "3")
    assert evaluate(data, *more, adapter=adapter) == 2
    message = capsys.readouterr().err
    assert "sieve.json" in message
    assert "run.json" in message
    assert "sentiment" in message
    run = {
        "label_structure": STRUCTURES["multimodal"].model_dump(mode="json"),
        "base_fingerprint": fingerprint(BASE),
    }
    (adapter.parent / "run.json").write_text(json.dumps(run))
    assert evaluate(data, *more, "--out", tmp_path / "o", adapter=adapter) == 0
    report = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert report["structure"] == "multimodal"
    assert evaluate(data, *more, "--structure", "llavac", adapter=adapter) == 0


@pytest.mark.parametrize("by_manifest", [True, False])
def test_an_adapter_of_another_base_is_refused(data, tmp_path, capsys, by_manifest):
    adapter = tmp_path / "run" / "adapter"
    copy_adapter(adapter)
    if by_manifest:
        Manifest(label_structure="llavac", base_fingerprint="0" * 32).save(adapter)
    else:
        run = {"label_structure": "llavac", "base_fingerprint": "0" * 32}
        (adapter.parent / "run.json").write_text(json.dumps(run))
    assert evaluate(data, adapter=adapter) == 2
    message = capsys.readouterr().err
    assert "another base" in message
    assert fingerprint(BASE) in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ratios", "1,1.5"), ["--ratios 1.5", "(0, 1]"]),
        (("--ratios", "1,half"), ["--ratios", "half"]),
        (("--selectors", "best"), ["--selectors 'best'", "cls, cls-last, stride, random"]),
        (("--split", "test"), ["split='test'", "'dev'"]),
        (("--train-split", "dev"), ["48 posts", "among the training posts"]),
        (("--structure", "nope"), ["'nope'", "llavac"]),
        (("--dtype", "int8"), ["--dtype", "float32", "int8"]),
        (("--server", "http://127.0.0.1:9"), ["--base", "--server"]),
        (("--limit", "0"), ["--limit", "0"]),
        (("--model", "x"), ["--model needs --server"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(data, capsys, flags, said):
    assert evaluate(data, *flags) == 2
    message = capsys.readouterr().err
    for part in said:
        assert part in message
    assert "Traceback" not in message


def test_a_missing_adapter_is_named(data, tmp_path, capsys):
    assert evaluate(data, adapter=tmp_path / "none") == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_label_outside_the_structure_is_refused_or_skipped(tmp_path, capsys):
    path = tmp_path / "posts.jsonl"
    rows = [
        {"id": f"p{i}", "text": f"a good day {i}", "labels": {"multimodal": label}}
        for i, label in enumerate(["positive", "neutral", "furious"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--split", "all", "--train-split", "none", "--ratios", "1")
    assert evaluate(path, *more) == 2
    message = capsys.readouterr().err
    assert "'p2'" in message
    assert "'furious'" in message
    assert evaluate(path, *more, "--skip-unlabelled") == 0
    assert "2 posts" in capsys.readouterr().out


def test_an_image_that_does_not_open_is_named_or_skipped(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [
        {"id": "good", "text": "a good day", "labels": {"multimodal": "positive"}},
        {"id": "bad", "text": "x", "image": "bad.png", "labels": {"multimodal": "positive"}},
    ]
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--split", "all", "--train-split", "none", "--ratios", "1")
    assert evaluate(path, *more) == 2
    assert "'bad'" in capsys.readouterr().err
    assert evaluate(path, *more, "--skip-broken") == 0
    assert "1 left out" in capsys.readouterr().out


def test_through_a_server_the_figures_are_the_same(data, demo_server, tmp_path):
    short = ("--ratios", "1,0.4", "--selectors", "cls", "--no-baselines")
    server = ("--server", demo_server.url, "--model", "llavac")
    assert evaluate(data, *short, "--out", tmp_path / "here") == 0
    assert (
        evaluate(data, *short, *server, "--out", tmp_path / "there", base=None, adapter=None) == 0
    )
    here, there = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("here", "there")
    )
    for one, other in zip(here["cells"], there["cells"], strict=True):
        figures, others = one["fields"]["multimodal"], other["fields"]["multimodal"]
        assert figures["macro_f1"] == others["macro_f1"]
        assert figures["confusion"] == others["confusion"]
        assert figures["ece"] == pytest.approx(others["ece"], abs=1e-3)


def copy_adapter(folder):
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((ADAPTER / name).read_bytes())
