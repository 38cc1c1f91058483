import json
from dataclasses import replace

import pytest

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.posts import Post
from serving.structures import STRUCTURES
from tests.train.evaluated import TalkingModel, by_image_and_text, by_text, labeled_posts
from train.evaluation import Plan, choose_posts, evaluate
from train.report.figures import summarize
from train.report.folder import check_out, prediction_rows, write_evaluation
from train.report.markdown import render_markdown, render_terminal

STRUCTURE = STRUCTURES["llavac"]
PLAN = Plan(ratios=(1.0, 0.4, 0.05), selectors=("cls", "random"), num_resamples=300)


def run(answer=by_image_and_text, *, posts=None, train=None, plan=PLAN, adapted=True):
    model = TalkingModel(answer, STRUCTURE, adapted=adapted)
    posts = labeled_posts(80, seed=1, start=1000) if posts is None else posts
    train = labeled_posts(60) if train is None else train
    return evaluate(model, choose_posts(STRUCTURE, posts), train=train, plan=plan)


@pytest.fixture(scope="module")
def evaluation():
    return run()


@pytest.fixture(scope="module")
def report(evaluation):
    return summarize(evaluation)


def test_the_report_has_a_cell_for_every_selector_and_ratio(report):
    cells = [(cell["selector"], cell["ratio"]) for cell in report["cells"]]
    assert cells == [(s, r) for s in ("cls", "random") for r in (1.0, 0.4, 0.05)]
    for cell in report["cells"]:
        figures = cell["fields"]["multimodal"]
        assert figures["accuracy"] == figures["macro_f1"] == 1.0
        assert figures["macro_f1_interval"] == [1.0, 1.0]
        assert figures["ece"] == pytest.approx(0.2)
        assert cell["kept_share"] == pytest.approx(cell["ratio"], abs=0.01)


def test_everything_that_has_to_be_beaten_is_there(report):
    assert list(report["baselines"]) == [
        "majority",
        "perfect text label",
        "perfect image label",
        "tf-idf",
        "text only",
        "image only",
        "zero-shot base",
    ]
    for name, against in report["comparisons"].items():
        assert report["baselines"][name]["multimodal"]["accuracy"] < 1
        assert against["difference"]["accuracy"]["value"] > 0
        assert against["mcnemar"]["only_second"] == 0


def test_a_model_that_looks_loses_by_shuffled_images(report):
    assert report["shuffled_images"]["lowers_the_score"]
    assert "uses its images" in report["conclusions"][0]


def test_a_model_that_does_not_look_allows_no_conclusion_on_retention():
    report = summarize(run(by_text))
    assert report["shuffled_images"]["drop"]["macro_f1"]["value"] == 0
    assert not report["shuffled_images"]["lowers_the_score"]
    assert report["conclusions"][0].startswith("No conclusion on retention can be drawn")


def test_losses_by_retention_are_paired_with_ratio_one_and_with_random():
    def worse(post, ratio, selector):
        label = by_image_and_text(post, ratio, selector)
        is_lost = selector == "random" and int(post.id[1:]) % 4 == 0 and ratio < 1
        return "neutral" if is_lost else label

    by_cell = {(c["selector"], c["ratio"]): c for c in summarize(run(worse))["cells"]}
    assert by_cell["random", 0.4]["difference_to_whole"]["macro_f1"]["high"] < 0
    assert by_cell["cls", 0.4]["difference_to_whole"]["macro_f1"]["value"] == 0
    assert by_cell["cls", 0.4]["difference_to_random"]["macro_f1"]["low"] > 0
    assert by_cell["random", 0.4]["difference_to_random"] is None


def test_all_visual_tokens_are_asked_for_once_and_always():
    model = TalkingModel(by_text, STRUCTURE)
    plan = Plan(ratios=(0.4,), selectors=tuple(SELECTORS), has_baselines=False)
    posts = choose_posts(STRUCTURE, labeled_posts(5))
    found = evaluate(model, posts, plan=plan)
    assert [ratio for _, ratio in model.asked].count(1.0) == 1
    assert {cell.ratio for cell in found.cells} == {0.4, 1.0}
    assert len(found.cells) == 2 * len(SELECTORS)


def test_the_share_of_well_formed_answers_is_counted(report):
    assert report["well_formed"] == 0.75


def test_without_training_posts_what_is_missing_is_said():
    report = summarize(run(train=[]))
    assert "tf-idf" not in report["baselines"]
    assert any("No training posts" in note for note in report["notes"])


def test_without_adapter_there_is_no_second_base():
    report = summarize(run(adapted=False))
    assert "zero-shot base" not in report["baselines"]
    assert any("no adapter" in note for note in report["notes"])


def test_text_only_posts_are_evaluated_without_image_controls():
    posts = [replace(post, images=()) for post in labeled_posts(30, seed=2, start=1000)]
    report = summarize(run(by_text, posts=posts))
    assert report["shuffled_images"] is None
    assert report["cells"][0]["kept_tokens"] is None
    assert "image only" not in report["baselines"]
    assert render_terminal(report)


def test_a_baseline_that_knows_less_is_compared_where_it_answers():
    posts = labeled_posts(40, seed=3, start=1000)
    posts[0] = replace(posts[0], labels={**posts[0].labels, "text": "neutral"})
    bare = {name: label for name, label in posts[0].labels.items() if name != "text"}
    posts[0] = replace(posts[0], labels=bare)
    report = summarize(run(posts=posts))
    assert report["comparisons"]["perfect text label"]["posts"] == 39
    assert report["comparisons"]["perfect image label"]["posts"] == 40


def test_posts_to_answer_are_never_training_posts():
    posts = labeled_posts(20)
    with pytest.raises(ConfigError, match="20 posts, e.g. 'p0', are among the training posts"):
        run(posts=posts, train=posts)


def test_two_sources_may_number_their_posts_alike():
    posts = [Post(id="1", text="a fine day", labels={"multimodal": "positive"})]
    train = [Post(id="1", text="a bad day", labels={"multimodal": "negative"})]
    assert summarize(run(posts=posts, train=train))["num_posts"] == 1


def test_a_model_is_called_better_than_tf_idf_only_where_the_interval_says_so(report):
    (said,) = [line for line in report["conclusions"] if "TF-IDF" in line]
    assert said.count(" better,") == 3
    (said,) = [line for line in summarize(run(by_text))["conclusions"] if "TF-IDF" in line]
    assert "better" not in said


ODD = Post(id="odd", text="x", labels={"multimodal": "angry"})
NO_LABEL = Post(id="none", text="x", labels={"image": "positive"})
BROKEN = Post(id="bad", text="x", images=(b"no image",), labels={"multimodal": "neutral"})
FINE = Post(id="fine", text="x", labels={"multimodal": "neutral"})


def test_a_label_outside_the_structure_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'odd'.*multimodal='angry'.*--skip-unlabelled"):
        choose_posts(STRUCTURE, [FINE, ODD])


def test_what_is_skipped_is_counted_by_reason():
    chosen = choose_posts(
        STRUCTURE, [FINE, ODD, NO_LABEL, BROKEN], skip_unlabelled=True, skip_broken=True
    )
    assert [post.id for post in chosen.posts] == ["fine"]
    assert chosen.skipped == {
        "a label outside 'llavac'": 1,
        "no label 'multimodal'": 1,
        "an image that does not open": 1,
    }


def test_no_posts_left_is_an_error_that_says_what_labels_there_are():
    with pytest.raises(ConfigError, match="none of 1 posts.*'multimodal'.*'image'"):
        choose_posts(STRUCTURE, [NO_LABEL])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"--ratios .* outside \(0, 1\]"):
        Plan(ratios=(1.0, ratio))


@pytest.mark.parametrize("values", [("clss",), ("cls", "cls"), ()])
def test_selectors_are_known_and_named_once(values):
    with pytest.raises(ConfigError, match="--selectors"):
        Plan(selectors=values)


def test_the_folder_holds_report_predictions_and_plots(evaluation, report, tmp_path):
    out = tmp_path / "runs" / "one"
    write_evaluation(out, evaluation, {"configuration": {"seed": 0}, **report})
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json",
        "evaluation.md",
        "predictions.jsonl",
        "retention.svg",
        "reliability.svg",
        "confusion.svg",
    }
    saved = json.loads((out / "evaluation.json").read_text())
    assert [cell["ratio"] for cell in saved["cells"]] == [1.0, 0.4, 0.05] * 2
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 80 * 6
    assert rows == list(prediction_rows(evaluation))
    assert rows[0]["truth"].keys() == rows[0]["labels"].keys() == {"image", "text", "multimodal"}
    assert "](retention.svg)" in (out / "evaluation.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["one"]


def test_figures_can_be_computed_again_from_the_predictions(evaluation, report, tmp_path):
    for cell in report["cells"]:
        rows = [
            row
            for row in prediction_rows(evaluation)
            if (row["selector"], row["ratio"]) == (cell["selector"], cell["ratio"])
        ]
        right = sum(row["labels"]["multimodal"] == row["truth"]["multimodal"] for row in rows)
        assert right / len(rows) == cell["fields"]["multimodal"]["accuracy"]


def test_a_failed_run_leaves_the_old_evaluation_whole(evaluation, report, tmp_path, monkeypatch):
    out = tmp_path / "one"
    write_evaluation(out, evaluation, report)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.report.folder.write_plots", full_disk)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        write_evaluation(out, evaluation, {**report, "num_posts": 0})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_same_evaluation_replaces_itself_and_gives_the_same_bytes(evaluation, report, tmp_path):
    out, configuration = tmp_path / "one", {"seed": 0, "ratios": (1.0, 0.4)}
    files = []
    for _ in range(2):
        check_out(out, configuration)
        write_evaluation(out, evaluation, {"configuration": configuration, **report})
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]


def test_another_configuration_is_refused_and_named(evaluation, report, tmp_path):
    out = tmp_path / "one"
    write_evaluation(out, evaluation, {"configuration": {"seed": 0, "split": "dev"}, **report})
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        check_out(out, {"seed": 1, "split": "dev"})


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is no evaluation"):
        check_out(tmp_path, {})


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out .* cannot be written"):
        check_out(tmp_path / "file" / "out", {})


def test_the_tables_read_well(report):
    text = render_markdown(report)
    assert "| cls      |   0.4 |" in text
    assert "shuffled images" in text
    assert "nan" not in text
    for line in render_terminal(report).splitlines():
        assert not line.startswith("|") or line.endswith("|")
