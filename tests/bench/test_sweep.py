"""The sweep: cells, quality, goodput and results; no server is started here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import main
from bench.cells import cells_of, dominated
from bench.generator import Senders
from bench.goodput import LOADS, Goal, Search
from bench.mix import Content
from bench.pictures import nudged, picture_url
from bench.quality import qualities
from bench.sweeping import Found as Swept
from bench.sweeping import Sweeper, find_connections, run_rounds, search_goodput
from serving.summary import Quality
from tests.bench.load_target import load_target
from tests.bench.swept import (
    CELLS,
    found_by_hand,
    outcome_by_hand,
    probe,
    searched,
    truth,
    with_failure,
)

LABELS = st.sampled_from(["negative", "neutral", "positive"])
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=40)


# Cells


def test_ratio_one_is_one_cell_since_all_selectors_keep_all():
    found = cells_of((1.0, 0.5), ("cls", "stride"))
    assert [cell.name for cell in found] == ["1/cls", "0.5/cls", "0.5/stride"]


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_a_point_is_dominated_if_and_only_if_another_is_no_worse_and_once_better(points):
    beaten = dominated(points)
    for name, (x, y) in points.items():
        better = [
            other for other, (a, b) in points.items() if (a >= x and b > y) or (a > x and b >= y)
        ]
        assert (name in beaten) == bool(better)
    assert len(beaten) < max(1, len(points))


# Quality


@given(PAIRS)
def test_quality_is_what_the_label_command_says_of_the_same_answers(pairs):
    known, given_ = zip(*pairs, strict=True)
    found = qualities(known, {"a": given_}, "a")["a"]
    expected = Quality.of({pair: pairs.count(pair) for pair in pairs})
    assert found.accuracy.value == pytest.approx(expected.accuracy)
    assert found.macro_f1.value == pytest.approx(expected.macro_f1)
    assert found.accuracy.low <= found.accuracy.value <= found.accuracy.high
    assert (found.f1_minus_reference.low, found.f1_minus_reference.high) == (0, 0)


def test_a_difference_is_paired_so_it_is_surer_than_its_two_sides():
    rng = np.random.default_rng(0)
    known = [truth(number) for number in range(600)]
    wrong = rng.random(600) < 0.2
    full = [truth(n + 1) if wrong[n] else truth(n) for n in range(600)]
    less = [truth(n + 1) if n < 12 else full[n] for n in range(600)]
    found = qualities(known, {"full": full, "less": less}, "full")
    width = {name: q.macro_f1.high - q.macro_f1.low for name, q in found.items()}
    difference = found["less"].f1_minus_reference
    assert difference.high < 0
    assert difference.high - difference.low < 0.5 * width["full"]


def test_answers_for_other_posts_than_known_are_refused():
    with pytest.raises(ValueError, match="each variant"):
        qualities(["a", "b"], {"x": ["a"]}, "x")


# Goodput


@pytest.mark.parametrize("fits", [0.0, *LOADS, 2.0])
def test_three_probes_find_the_highest_rate_that_meets_the_goal(fits):
    search = searched(100.0, fits)
    assert len(search.probes) <= 3
    best = max([load for load in LOADS if load <= fits], default=0)
    assert search.goodput()["rate"] == pytest.approx(100 * best)


def test_a_probe_whose_generator_fell_behind_is_made_again_once():
    search = Search(capacity=100.0, goal=Goal(ms=500, share=0.95))
    load = search.next_load
    good = probe(load, 100.0, 0.2)
    late = replace(good, rows=[replace(row, sent_s=row.sent_s + 0.1) for row in good.rows])
    assert late.void
    search.add(late)
    assert search.next_load == load
    search.add(good)
    assert search.next_load > load


def test_what_was_not_answered_is_not_in_time():
    found = probe(0.5, 100.0, 0.1)
    rows = [replace(row, status=503) if row.number % 10 == 0 else row for row in found.rows]
    share = replace(found, rows=rows).within(Goal(ms=500, share=0.95))
    assert (share.hits, share.count) == (180, 200)


# Pictures


def test_two_numbers_give_two_pictures_that_differ_from_the_post_in_two_pixels_only():
    import base64
    import io

    from PIL import Image

    def pixels(url):
        raw = base64.b64decode(url.split(",")[1])
        return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)

    url = picture_url(0, 0, (20, 20))
    found = [pixels(nudged(url, number)) for number in (*range(300), 1 << 16, (1 << 24) - 1)]
    assert len({each.tobytes() for each in found}) == len(found)
    for each in found:
        change = np.abs(each - pixels(url))
        assert change.max() <= 15
        assert change[0, 2:].max() == change[1:].max() == 0


# Results


def test_a_cell_has_its_paired_speed_quality_goodput_and_percentiles():
    full, cls, random = outcome_by_hand().results["cells"]
    assert full["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert cls["speedup"]["low"] == cls["speedup"]["high"] == pytest.approx(2.0)
    assert cls["posts_per_s"]["median"] == pytest.approx(60 / 1.2)
    assert cls["goodput"]["rate"] == pytest.approx(0.58 * 60 / 1.2, rel=0.25)
    assert random["goodput"] is None
    assert (cls["kept"], full["kept"], cls["output_tokens"]) == (26, 64, 5)
    assert cls["accuracy"]["value"] == pytest.approx(0.9)
    assert cls["f1_minus_full"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert random["f1_minus_full"]["high"] < 0
    assert [cell["dominated"] for cell in (full, cls, random)] == [True, False, True]
    assert cls["p95_ms"] == pytest.approx(1400, rel=0.01)
    assert cls["p99_ms"] is None  # of 300 answers


def test_a_post_that_one_cell_failed_on_is_judged_in_none():
    results = outcome_by_hand(with_failure(found_by_hand())).results
    assert results["num_judged"] == 299
    assert [cell["failures"] for cell in results["cells"]] == [0, 0, 1]


def test_posts_without_labels_have_speed_and_no_quality():
    found = found_by_hand()
    found.posts = {name: replace(post, labels={}) for name, post in found.posts.items()}
    outcome = outcome_by_hand(found)
    assert outcome.results["cells"][0]["macro_f1"] is None
    assert not any(cell["dominated"] for cell in outcome.results["cells"])
    assert "no accuracy" in outcome.markdown()


def test_drift_and_cache_hits_are_said():
    found = found_by_hand(num_tower_images=850)
    slow = [replace(row, done_s=2 * row.done_s) for row in found.drift[1].rows]
    found.drift[1] = replace(found.drift[1], rows=slow)
    outcome = outcome_by_hand(found)
    assert outcome.results["drift"]["change"] == pytest.approx(-0.5)
    assert "LARGE" in outcome.markdown()
    assert "850 of 900" in outcome.markdown()


def test_the_outcome_is_plain_json():
    json.dumps(outcome_by_hand().as_json(), allow_nan=False)


# Measuring, on a stub that answers labels


@pytest.fixture
def target():
    with load_target() as found:
        yield found


def posts(count):
    url = picture_url(0, 0, (16, 16))
    return [Content(id=str(n), text=f"post {n}", images=(url,), labels={}) for n in range(count)]


def test_every_round_asks_every_cell_the_same_posts_with_images_never_sent_before(tmp_path, target):
    found = Swept(posts={}, connections=4)
    with Senders(tmp_path / "log") as senders:
        sweeper = Sweeper(target.url, senders, tmp_path, "llavac", 10)
        run_rounds(sweeper, CELLS, [posts(6), posts(12)[6:]], 0, found)
    assert len(target.bodies) == sweeper.num_images == 36
    assert len({body["image"] for body in target.bodies}) == 36
    for cell in CELLS:
        assert [[row.id for row in block.rows] for block in found.of(cell)] == [
            [str(n) for n in range(6)],
            [str(n) for n in range(6, 12)],
        ]
    asked = {(b["retention_ratio"], b["selector"], b["model"]) for b in target.bodies}
    assert asked == {(cell.ratio, cell.selector, "llavac") for cell in CELLS}


def test_goodput_is_searched_for_every_cell_to_its_end(tmp_path, target):
    found = found_by_hand()
    found.searches = {}
    with Senders(tmp_path / "log") as senders:
        sweeper = Sweeper(target.url, senders, tmp_path, None, 10)
        goal = Goal(ms=5000, share=0.9)
        search_goodput(sweeper, CELLS[:2], posts(8), goal, 0, found)
    assert list(found.searches) == ["1/cls", "0.4/cls"]
    for _, search in found.searches.values():
        assert search.next_load is None
        assert all(len(each.rows) == 8 for each in search.probes)


class Saturating:
    """Instead of a sweeper: so many posts/s a connection, up to a cell's most."""

    def block(self, cell, posts, connections, phase):
        most = {1.0: 40.0, 0.4: 90.0}[cell.ratio]
        return SimpleNamespace(posts_per_s=min(5.0 * connections, most))


def test_connections_are_doubled_while_that_pays_and_are_enough_for_every_cell():
    found = Swept(posts={})
    assert find_connections(Saturating(), CELLS[:2], [], found) == 32
    tried = [(cell.ratio, connections) for cell, connections, _ in found.levels]
    assert tried == [(1.0, 4), (1.0, 8), (1.0, 16)] + [(0.4, n) for n in (4, 8, 16, 32, 64)]


def test_a_whole_sweep_of_a_running_server_writes_its_report(tmp_path, target, capsys):
    with (tmp_path / "posts.jsonl").open("w") as file:
        for number in range(24):
            labels = {"multimodal": "neutral" if number % 3 else "positive"}
            image = picture_url(0, number, (16, 16))
            row = {"id": str(number), "text": "a post", "image": image, "labels": labels}
            file.write(json.dumps(row) + "\n")
    argv = ["sweep", "--server", target.url, "--data", str(tmp_path / "posts.jsonl")]
    argv += ["--ratios", "1", "0.5", "--selectors", "cls", "stride", "--rounds", "3"]
    argv += ["--block", "6", "--probe", "8", "--connections", "4", "--out", str(tmp_path / "out")]
    assert main([*argv, "--json", str(tmp_path / "sweep.json")]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert set(found) == {"environment", "title", "settings", "results", "notes", "samples"}
    cells = found["results"]["cells"]
    assert [cell["name"] for cell in cells] == ["1/cls", "0.5/cls", "0.5/stride"]
    assert [(cell["requests"], cell["failures"]) for cell in cells] == [(18, 0)] * 3
    assert [cell["kept"] for cell in cells] == [64, 32, 32]
    assert cells[0]["accuracy"]["value"] == pytest.approx(2 / 3)  # the stub says neutral
    caches = found["results"]["caches"]
    assert caches["images"] == caches["tower_images"]
    assert found["results"]["latency"]
    assert len(found["samples"]) == 9
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.md", "report.html", "report.json", "cells.csv", "requests.csv"} <= written
    assert "0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--ratios", "0.4"], "1.0 must be there"),
        (["--ratios", "1.0", "1.4"], "above 0 and up to 1"),
        (["--selectors", "best"], "cls-last"),
        (["--goal-share", "1.5"], "below 1"),
        (["--model", "nowhere"], "config.json"),
        (["--data", "nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_a_server_starts(argv, word, capsys, tmp_path):
    assert main(["sweep", "--out", str(tmp_path), *argv]) == 2
    assert word in capsys.readouterr().err
