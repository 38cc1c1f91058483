"""Shapes: what is timed in which order, what is said of it, and whether it fits."""

import argparse
import json
import os
import re
from dataclasses import replace

import pytest
import torch

from bench import shape
from bench.__main__ import build_parser, main
from bench.checkpoints import IMAGE_TOKEN_ID, write_shape
from bench.flops import PAPER_SPEEDUPS, RATIOS, SHAPES, Shape
from bench.kernels import read_kernels, summed
from bench.outcome import BenchError
from bench.shape_engine import BEFORE, OURS, STRUCTURES_BY_ANSWER, THEIRS, prompt_ids
from bench.shape_process import GIB, Room
from bench.shape_table import Case, summarise
from serving.constraint import compile_structure
from serving.prompts import encode_answer, render_chat
from serving.server import load_tokenizer
from serving.settings import Settings
from serving.structures import STRUCTURES


def options(*argv) -> argparse.Namespace:
    return build_parser().parse_args(["shape", *argv])


class Clock:
    """Engines that take as long as a function of the case says."""

    def __init__(self, seconds_of, *, holds_all):
        self.seconds_of, self.holds_all, self.timed = seconds_of, holds_all, []

    def time(self, case, profile=""):
        self.timed.append(case)
        return self.seconds_of(case)


def timed(seconds_of, chosen, *, holds_all=True):
    clock = Clock(seconds_of, holds_all=holds_all)
    return list(shape.time_cases(clock, chosen)), clock.timed


def found_by(seconds_of, *argv, of=None):
    chosen = options(*argv)
    samples, _ = timed(seconds_of, chosen)
    return summarise(samples, of or SHAPES[chosen.shape], chosen, shape.NUM_LABEL_TOKENS)


def as_the_model_says(case):
    tokens = shape.NUM_LABEL_TOKENS[case.answer]
    flops = Shape().request_flops(case.ratio, text_tokens=50, output_tokens=tokens)
    return flops / 1e12 * (8 if case.load == "saturated" else 1)


def test_every_case_comes_once_a_round_and_stock_only_at_all_patches():
    samples, cases = timed(lambda case: 1.0, options("--rounds", "3"))
    assert len(samples) == len(cases) == 3 * 2 * 2 * (len(RATIOS) + 1)
    assert {case.ratio for case in cases if case.side == THEIRS} == {1.0}
    for index in range(3):
        names = [sample.variant for sample in samples if sample.round == index]
        assert len(set(names)) == len(names) == 28


def test_engines_that_do_not_fit_together_start_once_more_than_there_are_rounds():
    _, cases = timed(lambda case: 1.0, options("--rounds", "3"), holds_all=False)
    sides = [case.side for case in cases]
    starts = [side for side, before in zip(sides, [None, *sides], strict=False) if side != before]
    assert starts == [OURS, THEIRS, OURS, THEIRS]


def test_a_machine_as_fast_as_the_model_meets_every_goal_of_one_label():
    outcome = found_by(as_the_model_says)
    for ratio in RATIOS[1:]:
        cells = outcome.results[str(ratio)]["cells"]
        assert cells["saturated/one"]["of_model"] == pytest.approx(1.0)
        assert cells["saturated/one"]["goal"].endswith("yes")
        assert cells["single/one"]["speedup"]["median"] > PAPER_SPEEDUPS[ratio]
        assert cells["single/one"]["goal"].endswith("yes")


def test_a_machine_that_gains_nothing_from_fewer_tokens_meets_none():
    outcome = found_by(lambda case: 2.0)
    goals = [cell["goal"] for found in outcome.results.values() for cell in found["cells"].values()]
    assert {goal.rsplit(" ", 1)[-1] for goal in goals if "one label" not in goal} == {"", "no"}


@pytest.mark.parametrize(("times", "verdict"), [(1.25, "yes"), (1.5, "no")])
def test_three_labels_saturated_may_take_a_third_longer_than_one_at_0_2(times, verdict):
    cells = found_by(lambda case: times if case.answer == "three" else 1.0).results["0.2"]["cells"]
    assert cells["saturated/three"]["of_one_label"]["median"] == pytest.approx(times)
    assert cells["saturated/three"]["goal"].endswith(verdict)
    assert cells["single/three"]["goal"].endswith("yes")


def test_a_saturated_block_counts_each_of_its_posts():
    cells = found_by(lambda case: 4.0, "--concurrency", "8").results["1.0"]["cells"]
    assert cells["single/one"]["s_per_post"] == 4.0
    assert cells["saturated/one"]["posts_per_s"] == 2.0


def test_stock_stands_beside_each_ratio_and_is_missing_where_it_was_not_run():
    def seconds(case):
        return 3.0 if case.side == THEIRS else case.ratio

    cell = found_by(seconds).results["0.2"]["cells"]["single/one"]
    assert cell["of_stock"]["median"] == pytest.approx(15.0)
    cell = found_by(seconds, "--no-stock").results["0.2"]["cells"]["single/one"]
    assert cell["of_stock"] is None


def test_ours_with_other_variables_is_one_more_side_at_every_ratio():
    argv = ("--before", "A=1", "B=")
    assert shape.before(options(*argv)) == {"A": "1", "B": ""}
    outcome = found_by(lambda case: 3.0 if case.side == "before" else 2.0, *argv)
    for found in outcome.results.values():
        assert all(c["of_before"]["median"] == pytest.approx(1.5) for c in found["cells"].values())


def test_settings_of_the_other_side_are_in_lower_case_and_stock_has_none_of_ours(tmp_path):
    chosen = options("--proposals", "--before", "label_proposals=false", "MALLOC_ARENA_MAX=1")
    chosen.kv_cache_gib = 1
    engines = shape.Engines(tmp_path, Room(needed=1, available=9, is_gpu=False), chosen)
    sides = {side: engines._plan(side)["settings"] for side in (OURS, THEIRS, BEFORE)}
    asked = {side: Settings(model="x", **plan).label_proposals for side, plan in sides.items()}
    assert asked == {OURS: True, THEIRS: False, BEFORE: False}
    assert "MALLOC_ARENA_MAX" not in sides[BEFORE]


@pytest.mark.parametrize("argv", [("clip-l",), ("--layers", "2"), ("llava-1.5-13b",)])
def test_another_shape_than_the_papers_is_not_held_against_the_paper(argv):
    chosen = options(*argv)
    outcome = found_by(lambda case: 1.0, *argv, of=shape.chosen_shape(chosen))
    assert any("the paper does not apply" in note for note in outcome.notes)
    assert not any("(paper)" in str(row[-1]) for row in outcome.rows)


def test_a_prompt_has_the_asked_length_and_is_never_repeated():
    first, second = prompt_ids(0, 0, 50), prompt_ids(0, 1, 50)
    assert len(first) == 51
    assert first.count(IMAGE_TOKEN_ID) == 1
    assert first != second


def test_answers_decode_as_many_tokens_as_the_served_constraint_needs(tmp_path):
    write_shape(tmp_path, Shape(layers=2), None)
    tokenizer = load_tokenizer(str(tmp_path))
    end = render_chat(tokenizer, "", 0)
    for answer, name in STRUCTURES_BY_ANSWER.items():
        constraint = compile_structure(
            STRUCTURES[name], lambda text: encode_answer(tokenizer, end, text)
        )
        assert constraint.num_steps == shape.NUM_LABEL_TOKENS[answer]


def test_the_kv_cache_holds_the_whole_load_at_ratio_1():
    gib = shape.kv_cache_gib(Shape(), options("--concurrency", "8"))
    assert gib * GIB >= 8 * (576 + 50 + 5) * Shape().kv_bytes_per_token
    assert shape.kv_cache_gib(Shape(), options("--concurrency", "64")) > gib


@pytest.mark.parametrize(("name", "billions"), [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35)])
def test_the_published_shapes_have_their_known_number_of_weights(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_13b_is_refused_where_24_gib_are_and_fits_with_fewer_layers():
    room = Room.find(SHAPES["llava-1.5-13b"], 3, 2)
    with pytest.raises(BenchError, match="llava-1.5-13b needs 30.4 GiB"):
        replace(room, available=24 * GIB).check("llava-1.5-13b")
    small = Room.find(replace(SHAPES["llava-1.5-13b"], layers=8), 3, 2)
    replace(small, available=24 * GIB).check("llava-1.5-13b")


def test_two_engines_stand_side_by_side_only_where_both_fit():
    room = Room(needed=10 * GIB, available=20 * GIB, is_gpu=False)
    assert room.holds_all
    assert not replace(room, available=19 * GIB).holds_all
    assert not replace(room, is_gpu=True).holds_all
    assert not replace(room, num_engines=3).holds_all


def test_an_operators_time_is_its_own_without_what_it_calls(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.nn.functional.linear(torch.ones(400, 400), torch.ones(400, 400))
    profiler.export_chrome_trace(str(tmp_path / "worker-ratio-0.2.json"))
    kernels = {kernel.name: kernel for kernel in read_kernels(tmp_path, "ratio-0.2")}
    events = json.loads((tmp_path / "worker-ratio-0.2.json").read_text())["traceEvents"]
    whole = sum(e["dur"] for e in events if e.get("name") == "aten::linear") / 1e3
    assert kernels["aten::mm"].calls == 1
    assert kernels["aten::linear"].ms < whole - kernels["aten::mm"].ms + 1e-3
    with pytest.raises(BenchError, match="no trace"):
        read_kernels(tmp_path, "ratio-0.4")


def test_on_a_gpu_its_kernels_are_counted_and_not_the_operators_that_start_them():
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900, "tid": 1},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10, "dur": 400, "tid": 7},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 500, "dur": 300, "tid": 7},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 900, "dur": 50, "tid": 7},
    ]
    assert [(k.name, k.ms, k.calls) for k in summed(events)] == [
        ("gemm", 0.7, 2),
        ("copy", 0.05, 1),
    ]


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="engines need two cores")
def test_all_engines_run_side_by_side_and_every_cell_is_filled(tmp_path, capsys):
    stored = tmp_path / "shape.json"
    argv = ["shape", "clip-l", "--rounds", "1", "--concurrency", "2", "--ratios", "1.0", "0.2"]
    argv += ["--proposals", "--before", "label_proposals=false"]
    assert main([*argv, "--kernels", "--json", str(stored)]) == 0
    results = json.loads(stored.read_text())["results"]
    assert set(results) == {"1.0", "0.2"}
    cells = {"single/one", "single/three", "saturated/one", "saturated/three"}
    for found in results.values():
        assert set(found["cells"]) == cells
        assert all(cell["of_stock"]["median"] > 0 for cell in found["cells"].values())
        assert any("mm" in kernel["name"] for kernel in found["kernels"])
        assert all(cell["of_before"]["median"] > 0 for cell in found["cells"].values())
    printed = capsys.readouterr().out
    assert "3 engines stood side by side" in printed
    assert re.search(r"sieve: [1-9]\d* of \d+ proposed ids taken", printed)
    assert "before: " not in printed, "it proposes nothing"


def test_a_cases_name_tells_all_cases_apart():
    chosen = options()
    cases = [case for side in (OURS, THEIRS) for case in shape.cases(chosen, side)]
    assert len({case.name for case in cases}) == len(cases)
    assert Case(side=OURS, load="single", answer="one", ratio=0.05).name == "sieve/single/one/0.05"
