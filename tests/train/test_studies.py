"""Studies: what they count is counted by hand here; tiny runs of each on the demo's base."""

import argparse
import importlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from serving.posts import Post
from serving.structures import SENTIMENTS, STRUCTURES
from tests.train.evaluated import marked
from train.__main__ import main
from train.commands import study as command
from train.demo.build import SHIPPED
from train.demo.dataset import demo_posts
from train.demo.export import export_mvsa
from train.examples import Examples
from train.fit import Material
from train.loop import AnswerTrainer
from train.model import load_llava
from train.recipes import make_recipe
from train.studies.catalog import STUDIES
from train.studies.cells import Cell, run_cells
from train.studies.findings import direction
from train.studies.lab import Lab
from train.studies.noise import flip_labels
from train.studies.prompts import NUM_TRAINED, PHRASINGS, count_flips
from train.studies.setup import Options, Setup
from train.studies.spread import compare, describe, summarize_seeds, vote
from train.studies.study import make_study
from train.studies.transfer import count_repeated

BASE = SHIPPED / "base"
LLAVAC = STRUCTURES["llavac"]
SMALL = ("rank=8", "alpha=16", "batch_size=16", "micro_batch_size=16", "num_epochs=0.5")


# What is counted, by hand.


def test_mean_and_deviation_over_seeds_are_those_of_the_seeds_figures():
    seeds = [marked([0, 1, 2, 0], guessed) for guessed in ([0, 1, 2, 0], [0, 1, 1, 1])]
    accuracy = summarize_seeds(seeds)["accuracy"]
    assert accuracy["by_seed"] == [1.0, 0.5]
    assert accuracy["mean"] == 0.75
    assert accuracy["std"] == pytest.approx(np.sqrt(0.125))
    assert describe([0.5])["std"] is None


def test_a_post_gets_the_label_that_most_seeds_gave_and_the_first_seeds_of_equals():
    seeds = [[0, 1, 2, 0], [1, 1, 0, 2], [1, 2, 1, 2]]
    voted = vote([marked([0, 0, 0, 0], guessed) for guessed in seeds])
    assert voted.guessed.tolist() == [1, 1, 2, 2]


def test_two_models_over_seeds_meet_in_mcnemar_with_each_post_once():
    true = [0] * 20
    right, wrong = [0] * 20, [1] * 20
    first = [marked(true, right)] * 3
    second = [marked(true, wrong[:8] + right[8:])] * 3
    found = compare(first, second)
    test = found["mcnemar"]
    assert (test["only_first"], test["only_second"]) == (8, 0)
    assert test["p_value"] == pytest.approx(binomtest(8, 8, 0.5).pvalue)
    assert [one["only_first"] for one in test["by_seed"]] == [8, 8, 8]


def test_a_difference_is_the_mean_over_seeds_and_turns_round_with_the_models():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 60)
    first = [marked(true, np.where(rng.random(60) < 0.8, true, 0)) for _ in range(3)]
    second = [marked(true, np.where(rng.random(60) < 0.3, true, 1)) for _ in range(3)]
    score = compare(first, second)["difference"]["macro_f1"]
    assert score["value"] == pytest.approx(np.mean(score["by_seed"]))
    assert score["low"] < score["value"] < score["high"]
    assert score["value"] == pytest.approx(
        -compare(second, first)["difference"]["macro_f1"]["value"]
    )
    assert compare(first, first)["difference"]["macro_f1"]["high"] == 0


def test_a_model_without_seeds_meets_every_seed_of_the_other():
    true = [0, 1, 2, 0]
    found = compare([marked(true, true), marked(true, [0] * 4)], [marked(true, [0] * 4)])
    assert found["difference"]["accuracy"]["by_seed"] == [0.5, 0.0]
    assert found["difference"]["accuracy"]["value"] == 0.25


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ({"low": 0.01, "high": 0.1, "by_seed": [0.1, 0.02]}, 1),
        ({"low": 0.01, "high": 0.1, "by_seed": [0.2, -0.02]}, 0),
        ({"low": -0.01, "high": 0.1, "by_seed": [0.1, 0.02]}, 0),
        ({"low": -0.2, "high": -0.1, "by_seed": [-0.1, -0.02]}, -1),
    ],
)
def test_a_verdict_needs_the_interval_and_every_seed(score, expected):
    assert direction(score) == expected


def test_flips_are_posts_whose_label_changed_in_the_field_that_counts():
    first = {"answers": {"image": ["a", "a", "a"], "multimodal": ["a", "b", "c"]}}
    other = {"answers": {"image": ["b", "b", "b"], "multimodal": ["a", "c", "b"]}}
    assert count_flips(first, other, "multimodal") == 2
    assert count_flips(first, first, "multimodal") == 0


@pytest.fixture(scope="module")
def clean():
    rng = np.random.default_rng(1)
    return [
        Post(id=str(i), text=f"text {i}", labels=dict(zip(LLAVAC.fields, row, strict=True)))
        for i, row in enumerate(rng.choice(SENTIMENTS, size=(50, 3)).tolist())
    ]


def changed(before, after, field):
    pairs = zip(before, after, strict=True)
    return {old.id for old, new in pairs if old.labels[field] != new.labels[field]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.33, 1.0])
def test_noise_changes_the_asked_share_of_unimodal_labels_and_never_the_posts(clean, share):
    noisy = flip_labels(LLAVAC, clean, ["image", "text"], share, seed=3)
    for field in ("image", "text"):
        assert len(changed(clean, noisy, field)) == round(share * 50)
        assert all(post.labels[field] in SENTIMENTS for post in noisy)
    assert not changed(clean, noisy, "multimodal")
    assert [(post.id, post.text) for post in noisy] == [(post.id, post.text) for post in clean]


def test_noise_is_drawn_from_the_seed_by_field_and_grows_with_the_share(clean):
    def flip(share, seed):
        return flip_labels(LLAVAC, clean, ["image", "text"], share, seed)

    little, much = flip(0.2, 0), flip(0.4, 0)
    assert flip(0.2, 0) == little
    assert changed(clean, little, "image") != changed(clean, flip(0.2, 1), "image")
    assert changed(clean, little, "image") != changed(clean, little, "text")
    for field in ("image", "text"):
        few = changed(clean, little, field)
        assert few < changed(clean, much, field)
        by_id = {post.id: post.labels[field] for post in much}
        assert all(by_id[post.id] == post.labels[field] for post in little if post.id in few)


def test_texts_that_were_trained_on_are_counted_whatever_their_space():
    train = [Post(id="1", text="a  b"), Post(id="2", text="")]
    posts = [Post(id="1", text="a b "), Post(id="2", text="a"), Post(id="3", text="")]
    assert count_repeated(train, posts) == 1


@pytest.mark.parametrize("name", PHRASINGS)
def test_there_are_ten_phrasings_that_hold_the_text(name):
    prompts = (STRUCTURES[name].prompt, *PHRASINGS[name])
    assert len(set(prompts)) == 2 * NUM_TRAINED == 10
    for prompt in prompts:
        assert prompt.count("{text}") == 1
        assert all(label in prompt for label in SENTIMENTS)


def test_phrasings_take_turns_over_the_training_posts(clean):
    model = load_llava(BASE)
    prompts = ("First: {text}", "Second: {text}")

    def prompt_of(examples, index):
        return model.tokenizer.decode(examples[index].prompt_ids)

    examples = Examples(model, LLAVAC, clean[:3], prompts=prompts)
    own = Examples(model, LLAVAC, clean[:3])
    for index, word in enumerate(("First", "Second", "First")):
        assert word in prompt_of(examples, index)
        assert "First" not in prompt_of(own, index)
        assert examples[index].answer_ids == own[index].answer_ids


# Cells.


def test_only_the_cells_that_are_missing_are_run(tmp_path, capsys):
    ran = []

    def cell(name):
        return Cell(name=name, kind="evaluation", work=lambda: ran.append(name) or {"value": name})

    cells = [cell("a"), cell("b"), cell("c")]
    first = run_cells(cells, tmp_path)
    (tmp_path / "b.json").unlink()
    again = run_cells(cells, tmp_path)
    assert ran == ["a", "b", "c", "b"]
    assert list(first) == list(again) == ["a", "b", "c"]
    assert {name: one["value"] for name, one in again.items()} == {n: n for n in "abc"}
    lines = capsys.readouterr().err.splitlines()
    assert "2 of 3 cells are there already" in lines[-2]
    assert re.fullmatch(r"cell 2 of 3, b: [\d.]+ s; all done", lines[-1])


def test_a_cell_that_fails_leaves_nothing_and_those_before_it_stay(tmp_path):
    def fail():
        raise KeyboardInterrupt

    cells = [
        Cell(name="a", kind="training", work=dict),
        Cell(name="b", kind="training", work=fail),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# Findings on answers that are written here.


def setup_of(study, dev, train=(), *, seeds=(0, 1), **options):
    return Setup(
        study=study,
        base=BASE,
        out=None,
        cache=None,
        dtype="float32",
        seeds=seeds,
        recipe=make_recipe("demo"),
        structure=LLAVAC,
        structures=STRUCTURES,
        material=Material(train=list(train) or dev, dev=dev, source={"source": "posts"}),
        options=Options(**options),
    )


def answered(posts, *, num_wrong=0, fields=tuple(LLAVAC.fields)):
    """Right answers but for the first few posts, in every field."""
    step = {label: SENTIMENTS[i - 1] for i, label in enumerate(SENTIMENTS)}
    answers = {
        field: [
            step[post.labels[field]] if i < num_wrong else post.labels[field]
            for i, post in enumerate(posts)
        ]
        for field in fields
    }
    return {"answers": answers, "kept": 13 * len(posts), "patches": 64 * len(posts), "seconds": 1.0}


def test_labels_compares_the_multimodal_field_of_both_arms(clean):
    study = make_study(setup_of("labels", clean))
    alone = ("multimodal",)
    results = {"ask-base-full": answered(clean, num_wrong=50)}
    results["ask-base-multimodal-only"] = answered(clean, num_wrong=50, fields=alone)
    for seed in (0, 1):
        results[f"ask-full-seed{seed}"] = answered(clean, num_wrong=5 * seed)
        results[f"ask-multimodal-only-seed{seed}"] = answered(clean, num_wrong=20, fields=alone)
    found = study.find(results)
    assert found.figures["arms"]["full"]["accuracy"]["by_seed"] == [1.0, 0.9]
    assert found.figures["arms"]["multimodal-only"]["accuracy"]["mean"] == 0.6
    test = found.figures["comparisons"]["full - multimodal-only"]["mcnemar"]
    assert (test["only_first"], test["only_second"]) == (20, 0)
    assert "`full` is better than `multimodal-only`" in found.conclusions[0]


@pytest.mark.parametrize("images_matter", [True, False])
def test_nothing_is_concluded_on_ratios_where_other_posts_images_cost_nothing(clean, images_matter):
    dev = [replace(post, images=(b"image",)) for post in clean]
    study = make_study(setup_of("retention", dev, ratios="1,0.2", selectors="cls"))
    results = {"ask-base-crop": answered(dev, num_wrong=40)}
    for seed in (0, 1):
        wrong = {"whole": 2, "shuffled": 30 if images_matter else 2}
        wrong |= {"cls-0.2": 2, "random-0.2": 20, "stride-0.2": 10}
        for what, num_wrong in wrong.items():
            results[f"ask-crop-{what}-seed{seed}"] = answered(dev, num_wrong=num_wrong)
    found = study.find(results)
    text = "\n".join(found.conclusions)
    assert ("No conclusion on retention" in text) == (not images_matter)
    assert ("`cls` against `random`: reliably better at 0.2" in text) == images_matter
    assert ("`stride` against all tokens: reliably worse at 0.2" in text) == images_matter
    cells = {cell["selector"]: cell for cell in found.figures["bases"]["crop"]["cells"]}
    assert set(cells) == {"cls", "stride", "random"}
    assert cells["cls"]["kept_share"] == pytest.approx(13 / 64)
    assert cells["cls"]["to_random"]["difference"]["accuracy"]["by_seed"] == pytest.approx(
        [0.36] * 2
    )


def test_a_model_no_better_than_the_majority_label_is_named(clean):
    study = make_study(setup_of("rank", clean, ranks="8,16"))
    results = {"ask-base": answered(clean, num_wrong=50)}
    for seed in (0, 1):
        for rank, wrong in ((8, 48), (16, 0)):
            results[f"ask-rank-{rank}-seed{seed}"] = answered(clean, num_wrong=wrong)
            cost = {"trainable_parameters": rank, "training_seconds": 2.0}
            results[f"train-rank-{rank}-seed{seed}"] = cost
    found = study.find(results)
    warning = found.conclusions[-1]
    assert "Not above the majority" in warning
    assert "`rank 8`" in warning
    assert "`rank 16`" not in warning
    assert [row[-2] for row in found.tables[0].rows] == [8, 16, None, None]


# The command.


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_module_and_flags_that_the_command_knows(name):
    assert issubclass(importlib.import_module(f"train.studies.{name}").STUDY, object)
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    known = {action.dest for action in parser._actions}
    assert known >= set(STUDIES[name].options)
    assert set(Options.model_fields) >= set(STUDIES[name].options)
    assert STUDIES[name].summary in command.describe_studies()


def test_the_studies_are_listed_without_any_other_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["study", "--list"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(entry.cost in text for entry in STUDIES.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 posts to train on, 16 to answer."""
    folder = tmp_path_factory.mktemp("posts")
    export_mvsa(demo_posts(64, split="train", balanced=True, seed=5), folder)
    rows = (folder / "labelResultAll.txt").read_text().splitlines()[1:]
    ids = [row.split("\t")[0] for row in rows]
    (folder / "train_ids.txt").write_text("\n".join(ids[:48]) + "\n")
    (folder / "dev_ids.txt").write_text("\n".join(ids[48:]) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(name, data, cache, out, *flags, settings=SMALL, seeds="0,1"):
    return [
        *("study", name, "--base", str(BASE), "--data", str(data), "--train-split", "train"),
        *("--dev-split", "dev", "--out", str(out), "--cache", str(cache), "--threads", "1"),
        *("--recipe", "demo", "--seeds", seeds, *flags),
        *(("--set", *settings) if settings else ()),
    ]


@pytest.mark.parametrize(
    ("name", "flags", "settings", "fault"),
    [
        ("label", (), SMALL, "allowed are labels, prompts"),
        ("labels", ("--to", "x"), SMALL, "--to is no flag of study 'labels'"),
        ("labels", (), ("seed=3",), "use --seeds"),
        ("labels", (), ("structure=sentiment",), "needs several"),
        ("labels", (), ("structure=multimodal",), "needs several"),
        ("labels", ("--dtype", "int8"), SMALL, "allowed are float32"),
        ("rank", (), ("rank=8",), "use --ranks"),
        ("rank", ("--ranks", "8,8"), (), "each once"),
        ("rank", ("--ranks", "0"), (), "between 1 and 512"),
        ("noise", ("--shares", "20"), SMALL, "a share lies in [0, 1]"),
        ("noise", (), ("structure=multimodal",), "no fields"),
        ("transfer", (), SMALL, "needs --to"),
        ("retention", ("--ratios", "2"), SMALL, "outside (0, 1]"),
        ("retention", ("--selectors", "best"), SMALL, "allowed are"),
        ("retention", ("--also-base", str(BASE)), SMALL, "image mode 'crop'"),
    ],
    ids=lambda value: "-".join(value)[:24] if isinstance(value, tuple) else None,
)
def test_a_bad_flag_is_named_and_nothing_is_written(
    data, cache, tmp_path, capsys, name, flags, settings, fault
):
    out = tmp_path / "study"
    assert main(arguments(name, data, cache, out, *flags, settings=settings)) == 2
    assert fault in capsys.readouterr().err
    assert not out.exists()


def run(name, data, cache, out, *flags, **options):
    assert main(arguments(name, data, cache, out, *flags, **options)) == 0
    content = json.loads((out / "study.json").read_text())
    text = (out / "study.md").read_text()
    assert "48 to train on (split train), 16 to answer" in text
    assert all(line in text for line in content["conclusions"] + content["limits"])
    assert content["conclusions"]
    pictures = re.findall(r"\]\((.*\.svg)\)", text)
    assert pictures
    assert all((out / name).read_text().startswith("<?xml") for name in pictures)
    assert not list(out.rglob("*.partial"))
    return content


@pytest.fixture(scope="module")
def labels(data, cache, tmp_path_factory):
    """The study `labels`, run without a stop."""
    out = tmp_path_factory.mktemp("labels") / "study"
    return out, run("labels", data, cache, out)


def test_labels_trains_both_arms_on_the_same_posts(labels):
    out, content = labels
    assert set(content["figures"]["arms"]) == {"full", "multimodal-only"}
    configs = [
        json.loads((out / "runs" / f"train-{arm}-seed1" / "config.json").read_text())
        for arm in ("full", "multimodal-only")
    ]
    assert [one["label_structure"]["name"] for one in configs] == ["llavac", "multimodal"]
    assert configs[0]["seed"] == configs[1]["seed"] == 1
    fields = [one["data"]["train"]["labels"]["multimodal"] for one in configs]
    assert fields[0] == fields[1]


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


def test_a_deleted_cell_is_the_only_one_that_runs_again(labels, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "study"
    shutil.copytree(labels[0], out)
    before = times(out)
    (out / "cells" / "ask-full-seed1.json").unlink()
    monkeypatch.setattr(AnswerTrainer, "train", None)
    content = run("labels", data, cache, out)
    after = times(out)
    assert {name for name in after if after[name] != before[name]} == {"ask-full-seed1.json"}
    assert content["figures"] == labels[1]["figures"]


def test_a_stopped_study_ends_as_one_that_was_not(labels, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "study"
    ask, count = Lab.ask, []

    def stop(self, *given, **options):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return ask(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Lab, "ask", stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments("labels", data, cache, out, seeds="0"))
    assert not (out / "study.json").exists()
    done = times(out)
    content = run("labels", data, cache, out, seeds="0")
    assert done.items() <= times(out).items()
    for arm, figures in content["figures"]["arms"].items():
        for metric, spread in figures.items():
            whole = labels[1]["figures"]["arms"][arm][metric]
            assert spread["by_seed"] == whole["by_seed"][:1]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seeds": "0,2"}, "seeds was [0, 1], is [0, 2]"),
        ({"settings": (*SMALL, "dropout=0.2")}, "recipe.dropout was 0.0, is 0.2"),
        ({"name": "rank"}, "study was 'labels', is 'rank'"),
    ],
    ids=["seeds", "recipe", "study"],
)
def test_another_configuration_is_refused_and_named(labels, data, cache, capsys, changes, fault):
    settings = SMALL[2:] if changes.get("name") == "rank" else SMALL
    given = {"name": "labels", "settings": settings, **changes}
    name = given.pop("name")
    assert main(arguments(name, data, cache, labels[0], **given)) == 2
    assert fault in capsys.readouterr().err


def test_other_posts_of_the_same_name_are_refused(labels, data, cache, tmp_path, capsys):
    other = tmp_path / data.name
    shutil.copytree(data, other)
    text = next((other / "data").glob("*.txt"))
    text.write_text("another text\n")
    assert main(arguments("labels", other, cache, labels[0])) == 2
    assert "data.digest" in capsys.readouterr().err


def test_prompts_trains_phrasings_in_turns_and_asks_all(data, cache, tmp_path):
    out = tmp_path / "study"
    content = run("prompts", data, cache, out, seeds="0")
    config = json.loads((out / "runs" / "train-mixed-seed0" / "config.json").read_text())
    assert config["data"]["prompts"] == content["configuration"]["prompts"][:NUM_TRAINED]
    measured = content["figures"]["phrasings"]["mixed"]
    assert [one["trained"] for one in measured] == [True] * 5 + [False] * 5
    assert measured[0]["flips"] is None
    assert all(0 <= one["flips"]["mean"] <= 1 for one in measured[1:])
    assert all(0 <= one["well_formed"]["mean"] <= 1 for one in measured)


def test_retention_asks_every_pair_on_both_bases(data, cache, tmp_path):
    pad = tmp_path / "pad"
    shutil.copytree(BASE, pad)
    path = pad / "preprocessor_config.json"
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    flags = ("--ratios", "1,0.2", "--selectors", "cls", "--also-base", str(pad))
    content = run("retention", data, cache, tmp_path / "study", *flags, seeds="0")
    for mode in ("crop", "pad"):
        cells = content["figures"]["bases"][mode]["cells"]
        assert [cell["selector"] for cell in cells] == ["cls", "random", "stride"]
        assert {cell["kept_share"] for cell in cells} == {13 / 64}
    assert len(content["figures"]["pad_minus_crop"]) == 4
    assert any("same weights" in line for line in content["limits"])


@pytest.mark.long
def test_transfer_answers_another_set_beside_its_own_baselines(data, cache, tmp_path):
    other = tmp_path / "other"
    export_mvsa(demo_posts(40, split="test", balanced=True, seed=6), other)
    rows = (other / "labelResultAll.txt").read_text().splitlines()[1:]
    ids = [row.split("\t")[0] for row in rows]
    (other / "train_ids.txt").write_text("\n".join(ids[:20]) + "\n")
    (other / "dev_ids.txt").write_text("\n".join(ids[20:]) + "\n")
    flags = ("--to", str(other), "--to-train-split", "train")
    content = run("transfer", data, cache, tmp_path / "study", *flags, seeds="0,1")
    assert content["configuration"]["to"]["posts"] == 20
    arms = content["figures"]["arms"]
    assert {"adapter", "zero-shot base", "majority"} < set(arms)
    assert sum("TF-IDF" in name for name in arms) == 2
    assert len(arms["adapter"]["macro_f1"]["by_seed"]) == 2
    assert content["figures"]["home"]["adapter"]["accuracy"]["mean"] >= 0


@pytest.mark.long
def test_noise_trains_on_flipped_labels_and_answers_clean_posts(data, cache, tmp_path):
    out = tmp_path / "study"
    content = run("noise", data, cache, out, "--shares", "0.5")
    assert set(content["figures"]["arms"]) == {"noise 0%", "noise 50%"}
    configs = {
        share: json.loads((out / "runs" / f"train-noise-{share}-seed0" / "config.json").read_text())
        for share in ("0", "50")
    }
    labels = {share: one["data"]["train"]["labels"] for share, one in configs.items()}
    assert labels["0"]["multimodal"] == labels["50"]["multimodal"]
    assert configs["50"]["data"]["flipped_share"] == 0.5
    assert set(content["figures"]["fields"]["noise 50%"]) == {"image", "text"}


@pytest.mark.long
def test_rank_counts_trainable_parameters(data, cache, tmp_path):
    settings = [one for one in SMALL if not one.startswith(("rank", "alpha"))]
    out = tmp_path / "study"
    content = run("rank", data, cache, out, "--ranks", "16,8", settings=settings)
    costs = content["figures"]["costs"]
    parameters = [costs[f"rank {rank}"]["trainable_parameters"] for rank in (8, 16)]
    assert parameters[1] == 2 * parameters[0]
    config = json.loads((out / "runs" / "train-rank-16-seed0" / "config.json").read_text())
    assert (config["recipe"]["rank"], config["recipe"]["alpha"]) == (16, 32)
