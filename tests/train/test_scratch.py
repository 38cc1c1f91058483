import dataclasses
import json

import pytest
from transformers import AutoImageProcessor

from serving.errors import ConfigError
from serving.manifest import read_image_mode
from serving.posts import Post
from train.__main__ import main
from train.demo.checkpoint import Shape
from train.demo.dataset import demo_posts
from train.scratch import build as build_module
from train.scratch import settings
from train.scratch.build import Build, build_base
from train.scratch.settings import LanguageRecipe, Size, TowerRecipe


def tiny() -> Size:
    return Size(
        shape=Shape(
            image_size=56, tower_width=64, tower_layers=2, text_width=64, text_mlp_width=128
        ),
        max_vocab_size=600,
        tower=TowerRecipe(num_steps=3, batch_size=8, num_topics=4, num_descriptions=4),
        reading=LanguageRecipe(num_steps=2, batch_size=8, learning_rate=1e-3),
        language=LanguageRecipe(num_steps=3, batch_size=8, learning_rate=1e-3),
        num_folds=2,
    )


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(settings.SIZES, "tiny", tiny)


@pytest.fixture(scope="module")
def posts():
    drawn = list(demo_posts(40, balanced=True))
    without_text = dataclasses.replace(drawn[0], text="")
    without_image = dataclasses.replace(drawn[1], images=())
    return [without_text, without_image, *drawn[2:]]


def build(posts, out, **changes):
    given = {"size": "tiny", "image_mode": "crop", "seed": 0, "source": "demo", "fresh": False}
    return build_base(posts, out, **{**given, **changes})


@pytest.fixture(scope="module")
def base(posts, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.SIZES, "tiny", tiny)
        report = build(posts, out, image_mode="pad")
    return out, report


def test_a_base_loads_without_a_missing_weight_and_takes_adapters_in_the_published_format(base):
    from safetensors import safe_open
    from transformers import LlavaForConditionalGeneration

    out, _ = base
    loaded, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with safe_open(out / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all(
        name.startswith(("vision_tower.vision_model.", "language_model.", "multi_modal_projector."))
        for name in names
    )
    text = loaded.config.text_config
    assert text.hidden_size // text.num_attention_heads >= 32
    assert not (out / ".build").exists()


def test_a_base_says_how_pictures_become_squares(base):
    out, _ = base
    assert read_image_mode(out) == "pad"
    assert AutoImageProcessor.from_pretrained(out).crop_size["height"] == 56


def test_the_report_says_what_was_learned_from_and_how_long_it_took(base, posts):
    out, report = base
    assert json.loads((out / "base.json").read_text()) == report
    assert report["settings"]["num_posts"] == len(posts)
    assert set(report["seconds"]) == {
        "tokenizer",
        "teachers",
        "tower",
        "reading",
        "language",
        "all",
    }
    assert "both/multimodal" in report["figures"]["teachers"]["out_of_fold"]
    assert any("no pretrained weights" in note for note in report["notes"])


def test_a_finished_base_is_kept_and_other_settings_are_refused(base, posts):
    out, report = base
    assert build(posts, out, image_mode="pad") == report
    with pytest.raises(ConfigError, match="image_mode"):
        build(posts, out, image_mode="crop")
    with pytest.raises(ConfigError, match="posts_sha256"):
        build(posts[1:], out, image_mode="pad")


def test_a_stopped_build_goes_on_to_the_same_weights(posts, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    build(posts, whole)
    stopped = tmp_path / "stopped"
    real = Build._make_language

    def stop(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Build, "_make_language", stop)
    with pytest.raises(KeyboardInterrupt):
        build(posts, stopped)
    assert not (stopped / "config.json").exists()
    with pytest.raises(ConfigError, match="seed"):
        build(posts, stopped, seed=1)
    monkeypatch.setattr(Build, "_make_language", real)
    monkeypatch.setattr(build_module, "learn_tokenizer", None)  # not done again
    build(posts, stopped)
    assert (stopped / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    posts = tmp_path / "posts.jsonl"
    posts.write_text('{"id": "1", "text": "x", "labels": {"sentiment": "positive"}}\n')
    start = ["base", "--data", str(posts), "--out", str(tmp_path / "out")]
    assert main([*start, "--size", "huge"]) == 2
    assert "'huge'" in capsys.readouterr().err
    assert main([*start, "--image-mode", "stretch"]) == 2
    assert "stretch" in capsys.readouterr().err
    assert main(start) == 2
    assert "1 posts are too few" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base.json").exists()


def test_posts_without_labels_are_refused(tmp_path):
    posts = [Post(id=str(i), text=f"text {i}") for i in range(40)]
    with pytest.raises(ConfigError, match="no field"):
        build(posts, tmp_path / "out")


def test_a_picture_that_does_not_open_names_its_post(posts, tmp_path):
    broken = dataclasses.replace(posts[5], images=(b"no image",))
    with pytest.raises(ConfigError, match=f"post '{broken.id}'"):
        build([*posts[:5], broken, *posts[6:]], tmp_path / "out")
