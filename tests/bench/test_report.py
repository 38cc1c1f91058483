"""The report: every cell in every form, pictures that say what they show, one page alone."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from bench.__main__ import main
from bench.environment import describe
from bench.flops import PAPER_SPEEDUPS
from bench.report import html, markdown, write
from bench.report_plots import nice_ticks
from tests.bench.swept import found_by_hand, outcome_by_hand, with_failure

STAGES = {
    "ratios": {
        ratio: {
            "stages": [
                {"name": f"stage {n}", "ms": 0.5 + n, "low": 0.4 + n, "high": 0.6 + n}
                for n in range(10)
            ],
            "end_to_end_ms": 51.0,
            "sum_ms": 50.0,
            "amdahl": None if ratio == "1.0" else 2.5,
        }
        for ratio in ("1.0", "0.4")
    }
}
SHAPE = {
    ratio: {"median_s": 2.0, "speedup": {"median": 1.91, "low": 1.8, "high": 2.0}}
    for ratio in ("1.0", "0.4")
}
PEERS = {"vllm": {"posts_per_s": 31.5, "ratio": {"median": 1.25, "low": 1.2, "high": 1.3}}}


def stored(outcome):
    return json.loads(json.dumps({"environment": describe(["sweep"]), **outcome.as_json()}))


@pytest.fixture
def sweep():
    return stored(outcome_by_hand(with_failure(found_by_hand())))


@pytest.fixture
def others():
    found = {"stages": STAGES, "shape": SHAPE, "peers": PEERS}
    return {name: {"results": results} for name, results in found.items()}


def test_every_cell_is_in_every_form(sweep, others, tmp_path):
    write(tmp_path, sweep, others)
    cells = sweep["results"]["cells"]
    assert json.loads((tmp_path / "report.json").read_text())["results"]["cells"] == cells
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [cell["name"] for cell in cells]
    assert float(rows[1]["speedup.median"]) == pytest.approx(2.0)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        for cell in cells:
            assert f"{cell['posts_per_s']['median']:.1f} [" in text
            assert f"{cell['macro_f1']['value']:.3f} [" in text


def test_paper_model_stages_peers_and_shape_stand_beside_the_sweep(sweep, others):
    for text in (markdown(sweep, others), html(sweep, others)):
        assert f"{PAPER_SPEEDUPS[0.4]:.2f}" in text
        assert "1.91 [1.80, 2.00]" in text
        assert "stage 9" in text
        assert "1.250 [1.200, 1.300]" in text
        assert "H200" in text
        assert "data sheet" in text
        assert sweep["environment"]["command"] in text


def test_the_page_is_one_file_without_script_or_anything_from_elsewhere(sweep, others):
    text = html(sweep, others)
    assert "<script" not in text
    assert not re.search(r"\bon[a-z]+=", text)
    assert not re.search(r"(?:src|href)=", text)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_every_colour_that_a_picture_names_is_there_in_light_and_dark(sweep, others):
    text = html(sweep, others)
    for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert text.count(f"{name}: #") == 2, name


def pictures(text):
    return {
        found.get("aria-label"): found
        for found in (ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text))
    }


def test_the_pareto_picture_has_a_point_a_cell_with_both_bars_and_dominated_ones_hollow(sweep):
    picture = pictures(html(sweep, {}))["Macro-F1 against posts a second"]
    assert len(picture.findall(".//line[@class='bar']")) == 2 * len(sweep["results"]["cells"])
    hints = {
        mark.find("title").text: mark.get("style")
        for mark in picture.iter()
        if mark.get("class") == "mark" and "posts/s" in mark.find("title").text
    }
    assert len(hints) == len(sweep["results"]["cells"])
    for hint, style in hints.items():
        assert ("fill:var(--page)" in style) == hint.endswith("dominated")


def test_marks_and_bars_lie_within_their_picture(sweep, others):
    for name, picture in pictures(html(sweep, others)).items():
        _, _, width, height = map(float, picture.get("viewBox").split())
        for mark in picture.iter():
            for key, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if mark.get(key) is not None:
                    assert 0 <= float(mark.get(key)) <= most, (name, mark.attrib)


def test_stage_bars_are_as_long_as_their_stages_and_small_ones_are_together(sweep, others):
    picture = pictures(html(sweep, others))["Where the time goes, by ratio"]
    hints = [bar.find("title").text for bar in picture.findall("rect") if not bar.get("class")]
    lengths = [float(hint.split(": ")[1].split()[0]) for hint in hints]
    assert sum(lengths) == pytest.approx(2 * 50, abs=0.1)
    assert sum("other" in hint for hint in hints) == 2


def test_a_sweep_without_labels_goodput_or_cost_has_a_report(tmp_path):
    found = found_by_hand()
    found.posts, found.searches = {}, {}
    sweep = stored(outcome_by_hand(found))
    sweep["results"]["cost"] = None
    write(tmp_path, sweep)
    assert "posts/s" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.62, 0.97), (37.2, 104.9), (5, 5), (0, 3e4)])
def test_ticks_enclose_the_range_and_are_round(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 9
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_the_command_joins_files_and_prints_the_table(sweep, others, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    argv = ["report", "--sweep", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "out")]
    for name, found in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        argv += [f"--{name}", str(tmp_path / f"{name}.json")]
    assert main(argv) == 0
    assert "0.4" in capsys.readouterr().out
    beside = json.loads((tmp_path / "out" / "report.json").read_text())["beside"]
    assert set(beside) == {"stages", "shape", "peers"}


@pytest.mark.parametrize(
    ("flag", "text"), [("--sweep", "{}"), ("--sweep", "no"), ("--stages", '{"results": {}}')]
)
def test_a_file_of_another_command_is_refused_by_name(flag, text, sweep, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    (tmp_path / "bad.json").write_text(text)
    argv = ["report", "--sweep", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "out")]
    assert main([*argv, flag, str(tmp_path / "bad.json")]) == 2
    assert flag in capsys.readouterr().err


@pytest.mark.browser
def test_a_browser_draws_the_page_and_asks_for_nothing(sweep, others, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    write(tmp_path, sweep, others)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,4000"]
    shot = f"--screenshot={tmp_path / 'page.png'}"
    call = [chromium, *flags, shot, f"file://{tmp_path / 'report.html'}"]
    subprocess.run(call, check=True, capture_output=True, timeout=120)
    from PIL import Image

    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50
