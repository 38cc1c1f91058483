"""`train export`: what the manifest says, and that nothing is left where something went wrong."""

import errno
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import train.export
from serving.errors import ConfigError
from serving.manifest import RetentionPoint, load_manifest
from serving.settings import DEMO
from serving.structures import STRUCTURES
from tests.checkpoints import write_processor
from tests.train.runs import CURVE, make_evaluation, make_run
from train.__main__ import main
from train.export import ExportOptions, export
from train.manifest import recommend


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "adapters" / "mine"


@pytest.fixture
def quick(monkeypatch):
    """No model is asked: probes and the engine have tests of their own."""
    monkeypatch.setattr(train.export, "make_probes", lambda *_: NoProbes())
    monkeypatch.setattr(train.export, "verify", lambda *_: None)


class NoProbes:
    def save(self, folder):
        (folder / "probes.json").write_text("{}")


def test_the_manifest_says_what_was_trained_and_how_good_it_is(quick, run, out, tmp_path):
    evaluation = make_evaluation(tmp_path / "evaluation", run)
    export(ExportOptions(run=run, out=out, evaluation=evaluation))
    names = {path.name for path in out.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "sieve.json",
        "probes.json",
    }
    manifest = load_manifest(out)
    assert manifest.label_structure == STRUCTURES["llavac"]
    assert (manifest.base_model, manifest.image_mode, manifest.recipe) == ("base", "crop", "llavac")
    assert (manifest.selector, manifest.margin, manifest.retention_ratio) == ("cls", 0.01, 0.4)
    assert manifest.trained.model_dump() == {
        "data": "posts",
        "split": "train",
        "num_posts": 2,
        "labels": {"image": {"positive": 1, "negative": 1}},
        "num_epochs": 2.0,
        "rank": 16,
        "alpha": 32.0,
        "seed": 3,
    }
    assert [p.ratio for p in manifest.retention_curve if p.selector == "cls"] == list(CURVE)
    assert manifest.quality["posts, dev, 450 posts, r=0.4"]["macro_f1"] == 0.893
    assert manifest.notes == ["by LoRA", "Images count."]
    assert str(tmp_path) not in (out / "sieve.json").read_text()


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.0, 0.8), (0.0069, 0.8), (0.007, 0.4), (0.03, 0.2), (1.0, 0.05)]
)
def test_the_recommended_ratio_is_the_smallest_within_the_margin(margin, expected):
    points = [
        RetentionPoint(selector="cls", ratio=ratio, macro_f1=score)
        for ratio, score in CURVE.items()
    ]
    assert recommend(points, "cls", margin) == expected
    with pytest.raises(ConfigError, match="--selectors random"):
        recommend(points, "random", margin)
    with pytest.raises(ConfigError, match="at ratio 1.0"):
        recommend(points[1:], "cls", margin)


def test_where_images_do_not_count_no_ratio_is_recommended(quick, run, out, tmp_path):
    evaluation = make_evaluation(
        tmp_path / "evaluation", run, shuffled_images={"lowers_the_score": False}
    )
    export(ExportOptions(run=run, out=out, evaluation=evaluation))
    manifest = load_manifest(out)
    assert manifest.retention_ratio is None
    assert manifest.retention_curve
    assert "other posts' images did not reliably lower the score" in manifest.notes[-1]


def test_without_an_evaluation_the_manifest_says_so(quick, run, out):
    export(ExportOptions(run=run, out=out))
    manifest = load_manifest(out)
    assert (manifest.retention_ratio, manifest.retention_curve) == (None, [])
    assert "Not evaluated" in manifest.notes[-1]


def test_a_structure_of_ones_own_travels_whole(quick, tmp_path, out):
    own = {"name": "mood", "fields": {"mood": ["good", "bad"]}, "prompt": "{text}\nMood?"}
    export(ExportOptions(run=make_run(tmp_path / "run", label_structure=own), out=out))
    assert load_manifest(out).label_structure.prompt == "{text}\nMood?"


def test_an_evaluation_through_a_server_is_named_as_such(quick, run, out, tmp_path):
    evaluation = make_evaluation(
        tmp_path / "evaluation", run, configuration={"server": "http://x", "model": "mine"}
    )
    export(ExportOptions(run=run, out=out, evaluation=evaluation))
    assert "as its model 'mine'" in load_manifest(out).notes[-1]


BAD_EVALUATIONS = {
    "label structure 'sentiment'": {"structure": "sentiment"},
    "another adapter": {"configuration": {"adapter_fingerprint": "0"}},
    "the base alone": {"configuration": {"base": "base"}},
    "another prompt": {"configuration": {"prompt": "What?"}},
    "at least 1 item": {"cells": []},
    "cells.0.ratio": {"cells": [{"selector": "cls", "fields": {}}]},
    "--ratios 1,": {"cells": [{"selector": "cls", "ratio": 0.4, "fields": {"multimodal": {}}}]},
}


@pytest.mark.parametrize("message", BAD_EVALUATIONS)
def test_an_evaluation_of_something_else_is_refused(quick, run, out, tmp_path, message):
    evaluation = make_evaluation(tmp_path / "evaluation", run, **BAD_EVALUATIONS[message])
    with pytest.raises(ConfigError, match=message):
        export(ExportOptions(run=run, out=out, evaluation=evaluation))
    assert not out.parent.exists()


def test_folders_that_hold_no_run_or_evaluation_are_refused(quick, run, out, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no run folder"):
        export(ExportOptions(run=empty, out=out))
    with pytest.raises(ConfigError, match=r"no evaluation\.json"):
        export(ExportOptions(run=run, out=out, evaluation=empty))
    (run / "run.json").unlink()
    with pytest.raises(ConfigError, match="has not finished"):
        export(ExportOptions(run=run, out=out))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}'])
def test_a_broken_record_is_refused(quick, run, out, content):
    (run / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        export(ExportOptions(run=run, out=out))


def test_a_run_that_is_unfinished_or_lost_its_adapter_is_refused(quick, tmp_path, out):
    unfinished = make_run(tmp_path / "unfinished", finished=False)
    with pytest.raises(ConfigError, match="has not finished"):
        export(ExportOptions(run=unfinished, out=out))
    lost = make_run(tmp_path / "lost")
    (lost / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter/adapter_model\.safetensors is missing"):
        export(ExportOptions(run=lost, out=out))


def test_the_base_must_be_the_one_that_was_trained_on(quick, run, out, tmp_path):
    moved = shutil.copytree(DEMO / "base", tmp_path / "moved")
    export(ExportOptions(run=run, out=out, base=moved))
    path = moved / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="another base"):
        export(ExportOptions(run=run, out=out.with_name("other"), base=moved))
    with pytest.raises(ConfigError, match="not there; say where it is with --base"):
        export(ExportOptions(run=run, out=out.with_name("other"), base=tmp_path / "no"))
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        export(ExportOptions(run=run, out=out.with_name("other"), base=tmp_path))


def test_a_base_that_pads_now_is_refused(quick, run, out, tmp_path):
    padding = shutil.copytree(DEMO / "base", tmp_path / "padding")
    write_processor(padding, pad_to_square=True, size=112)
    with pytest.raises(ConfigError, match="'pad', the run was trained with 'crop'"):
        export(ExportOptions(run=run, out=out, base=padding))


@pytest.mark.parametrize(
    ("changes", "message"), [({"selector": "best"}, "'best'"), ({"margin": 2.0}, "margin 2")]
)
def test_settings_that_are_not_allowed_are_refused(quick, run, out, changes, message):
    with pytest.raises(ConfigError, match=message):
        export(ExportOptions(run=run, out=out, **changes))


def test_what_is_there_stays_unless_it_is_to_be_replaced(quick, run, out):
    export(ExportOptions(run=run, out=out))
    (out / "mark").touch()
    with pytest.raises(ConfigError, match="is there already"):
        export(ExportOptions(run=run, out=out))
    assert (out / "mark").exists()
    export(ExportOptions(run=run, out=out, replace=True))
    assert not (out / "mark").exists()
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_an_adapter_that_fails_in_vllm_leaves_nothing(quick, run, out, monkeypatch):
    def fail(folder, base):
        assert folder.name == "mine"
        raise ConfigError("differs")

    monkeypatch.setattr(train.export, "verify", fail)
    with pytest.raises(ConfigError, match="differs"):
        export(ExportOptions(run=run, out=out, merged=out.with_name("merged")))
    assert not list(out.parent.iterdir())


def test_a_full_disk_leaves_nothing_and_what_was_there_stays(quick, run, out, monkeypatch):
    export(ExportOptions(run=run, out=out))
    before = sorted(path.read_bytes() for path in out.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ConfigError, match="disk is full"):
        export(ExportOptions(run=run, out=out, replace=True))
    assert sorted(path.read_bytes() for path in out.iterdir()) == before
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_an_out_that_cannot_be_written_is_refused(quick, run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out .* cannot be written"):
        export(ExportOptions(run=run, out=tmp_path / "file" / "mine"))


def test_a_verification_that_cannot_run_says_why(run, out, monkeypatch):
    """The real command, on a base that is none: it ends before an engine starts."""
    with pytest.raises(ConfigError, match=r"--no-verify[\s\S]*cannot be read"):
        train.export.verify(run / "adapter", out)


def test_the_command_exports(quick, run, out, capsys):
    assert main(["export", str(run), "--out", str(out), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out
    assert json.loads((out / "sieve.json").read_text())["recipe"] == "llavac"
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
