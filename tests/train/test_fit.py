"""Trainings of the demo's base on a few synthetic posts, through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serving.structures import STRUCTURES
from train.__main__ import main
from train.demo.build import SHIPPED
from train.demo.dataset import demo_posts
from train.demo.export import export_mvsa
from train.model import load_llava
from train.predict import write_freely
from train.sight import Sight

BASE = SHIPPED / "base"
SMALL = ("rank=16", "alpha=32", "batch_size=16", "micro_batch_size=8", "dropout=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """96 posts to train on, 24 to evaluate on."""
    folder = tmp_path_factory.mktemp("posts")
    export_mvsa(demo_posts(120, split="train", balanced=True, seed=5), folder)
    ids = [line.split("\t")[0] for line in (folder / "labelResultAll.txt").read_text().split("\n")]
    ids = [id_ for id_ in ids[1:] if id_]
    (folder / "train_ids.txt").write_text("\n".join(ids[:96]) + "\n")
    (folder / "dev_ids.txt").write_text("\n".join(ids[96:]) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(data, cache, out, *settings, recipe="demo", flags=()):
    return [
        *("fit", recipe, "--base", str(BASE), "--data", str(data), "--train-split", "train"),
        *("--dev-split", "dev", "--out", str(out), "--cache", str(cache), "--threads", "1"),
        *("--set", *SMALL, "dtype=float32", *settings),
        *flags,
    ]


def train(data, cache, out, *settings, **options):
    assert main(arguments(data, cache, out, *settings, **options)) == 0
    return json.loads((out / "run.json").read_text())


def adapter_weights(run: Path):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def log_of(run: Path):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, cache, tmp_path_factory):
    """Three epochs without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data, cache, out, "num_epochs=3", "save_every=2")
    return out


def test_the_loss_falls_and_the_run_folder_says_what_happened(whole):
    losses = [entry["loss"] for entry in log_of(whole) if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    summary = json.loads((whole / "run.json").read_text())
    assert summary["num_steps"] == 18
    assert summary["data"]["train"]["posts"] == 96
    assert summary["data"]["dev"]["posts"] == 24
    assert sum(summary["data"]["train"]["labels"]["multimodal"].values()) == 96
    assert 0 <= summary["metrics"]["macro_f1"] <= 1
    assert list(whole.glob("tensorboard/events*"))
    assert not list(whole.glob("*.partial"))


def test_a_killed_run_ends_with_the_same_weights_as_one_that_was_not(data, cache, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train"]
    command += arguments(data, cache, out, "num_epochs=3", "save_every=2")
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": "."}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    # Step 8 is in the middle of the second epoch of 6 steps.
    while not (out / "checkpoints" / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "adapter").exists()
    train(data, cache, out, "num_epochs=3", "save_every=2")
    resumed, expected = adapter_weights(out), adapter_weights(whole)
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
    figures = [(e["step"], e["loss"]) for e in log_of(whole) if "loss" in e]
    assert [(e["step"], e["loss"]) for e in log_of(out) if "loss" in e] == figures


def test_a_finished_run_is_not_trained_again(data, cache, whole):
    before = (whole / "run.json").stat().st_mtime_ns
    train(data, cache, whole, "num_epochs=3", "save_every=2")
    assert (whole / "run.json").stat().st_mtime_ns == before


def test_another_config_is_refused_and_names_what_differs(data, cache, whole, capsys):
    assert main(arguments(data, cache, whole, "num_epochs=2", "save_every=2")) == 2
    message = capsys.readouterr().err
    assert "recipe.num_epochs was 3.0, is 2.0" in message
    assert "--fresh" in message
    assert (whole / "run.json").exists()


def test_the_adapter_learns_the_form_of_the_answers(data, cache, whole):
    posts = list(demo_posts(20, split="test", balanced=True, seed=5))
    structure = STRUCTURES["llavac"]

    def num_well_formed(adapter):
        model = load_llava(BASE, adapter)
        answers = write_freely(model, structure, posts, Sight(model, cache))
        return sum(structure.parse(answer) is not None for answer in answers)

    assert num_well_formed(None) == 0
    assert num_well_formed(whole / "adapter") >= 10


def test_features_from_the_cache_and_from_the_tower_train_the_same(data, cache, tmp_path):
    runs = {}
    for choice in ("always", "never"):
        out = tmp_path / choice
        train(data, cache, out, "num_epochs=1", f"cache={choice}", "dropout=0.0")
        runs[choice] = adapter_weights(out)
    for name, value in runs["always"].items():
        torch.testing.assert_close(runs["never"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_small_micro_batches_take_the_same_steps_as_large_ones(data, cache, tmp_path):
    runs = {}
    for size in (4, 16):
        out = tmp_path / str(size)
        settings = ("num_epochs=1", f"micro_batch_size={size}", "dropout=0.0")
        train(data, cache, out, *settings, "group_by_length=false")
        runs[size] = adapter_weights(out)
    for name, value in runs[16].items():
        torch.testing.assert_close(runs[4][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        ("balance=weights",),
        ("balance=sqrt-weights",),
        ("balance=sampling",),
        ("retention_ratio=0.4",),
        ("gradient_checkpointing=true",),
        ("projector=lora",),
        ("dtype=bfloat16",),
        ("label_smoothing=0.1",),
    ],
    ids=lambda value: value[0],
)
def test_options_train(data, cache, tmp_path, settings):
    out = tmp_path / "run"
    train(data, cache, out, "num_epochs=0.5", *settings)
    weights = adapter_weights(out)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    assert not any("vision_tower" in name for name in weights)
    has_projector = any("multi_modal_projector" in name for name in weights)
    assert has_projector == (settings[0] == "projector=lora")


def test_the_best_evaluation_is_kept_and_training_stops_early(data, cache, tmp_path):
    out = tmp_path / "run"
    settings = ("num_epochs=8", "keep=best", "patience=2", "learning_rate=0.03")
    summary = train(data, cache, out, *settings)
    scores = {e["step"]: e["eval_macro_f1"] for e in log_of(out) if "eval_macro_f1" in e}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert summary["best_step"] == best
    assert summary["metrics"]["macro_f1"] == scores[best]
    assert summary["num_steps"] < 48 or best > 36


def test_a_dry_run_shows_sizes_and_an_example_and_writes_nothing(data, cache, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*arguments(data, cache, out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for word in ("trainable", "steps", "memory_gib", "prompt_ids", "ASSISTANT:"):
        assert word in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (("rank=0",), "rank=0"),
        (("learning_rat=1",), "learning_rat"),
        (("batch_size=12", "micro_batch_size=8"), "no multiple"),
        (("selector=best",), "allowed are ['cls'"),
        (("patience=2",), "keep='best'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_setting_is_named_with_what_is_allowed(
    data, cache, tmp_path, capsys, settings, fault
):
    assert main(arguments(data, cache, tmp_path / "run", *settings)) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_post_in_both_splits_is_refused(data, cache, tmp_path, capsys):
    given = arguments(data, cache, tmp_path / "run")
    given[given.index("dev")] = "train"
    assert main(given) == 2
    assert "both splits" in capsys.readouterr().err


def test_an_image_that_does_not_open_names_its_post_or_is_counted(data, cache, tmp_path, capsys):
    import shutil

    broken = tmp_path / "posts"
    shutil.copytree(data, broken)
    first = (broken / "train_ids.txt").read_text().split()[0]
    (broken / "data" / f"{first}.png").write_bytes(b"not an image")
    out = tmp_path / "run"
    assert main(arguments(broken, cache, out, "num_epochs=0.5")) == 2
    assert f"post '{first}'" in capsys.readouterr().err
    summary = train(broken, cache, tmp_path / "other", "num_epochs=0.5", flags=("--skip-broken",))
    assert summary["data"]["left_out"] == {"broken image": 1}
    assert summary["data"]["train"]["posts"] == 95


LIMITED = """
import resource, sys
from train.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("is_seen", [True, False], ids=["features cached", "features not cached"])
def test_a_full_disk_ends_a_run_cleanly_and_it_goes_on_later(data, cache, whole, tmp_path, is_seen):
    out = tmp_path / "run"
    cache = cache if is_seen else tmp_path / "cache"
    given = arguments(data, cache, out, "num_epochs=1", "save_every=2")
    command = [sys.executable, "-c", LIMITED, *given]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "adapter").exists()
    assert not (out / "run.json").exists()
    assert main(given) == 0
    assert (out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_two_processes_take_the_same_steps_as_one(data, cache, tmp_path):
    settings = ("num_epochs=2", "micro_batch_size=4", "dropout=0.0")
    train(data, cache, tmp_path / "one", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--module", "train", *arguments(data, cache, tmp_path / "two", *settings)]
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)

    def losses(run):
        return [entry["loss"] for entry in log_of(run) if "loss" in entry]

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)
