"""`bench stages`: what is noted in real processes, what an instant counts as, what is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import stage_points, stage_table
from bench.__main__ import build_parser, main
from bench.flops import RATIOS
from bench.outcome import BenchError
from bench.stage_clock import MAX_ROWS, ROW, StageClock
from bench.stage_load import Load
from bench.stage_points import (
    API,
    CORE,
    CROSSING,
    FOLDER_VARIABLE,
    FORWARD,
    HANDING,
    HTTP,
    IMAGE,
    LATER,
    LOOP,
    POINTS,
    PREFILL,
    PROJECTOR,
    QUEUE,
    SCHEDULER,
    STAGES,
    TASK_STEP,
    UNATTRIBUTED,
    WORKER,
    write_hook,
)
from bench.stage_server import CLIP_L, LLAVA, PLAIN, TIMED, Question, _checkpoint
from bench.stage_spans import Span, Timed, attribute, attributed, busy, read_spans

ROOT = Path(__file__).resolve().parents[2]


def request(end=10.0, *, ratio=1.0, turn=0, num_tokens=1, num_prompt_tokens=100):
    return Timed(
        round=turn,
        ratio=ratio,
        start=0.0,
        sent=1.0,
        end=end,
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
    )


def point(stage):
    return next(i for i, known in enumerate(POINTS) if known.stage == stage)


def span(role, stage, start, end, thread=1):
    number = TASK_STEP if stage == LOOP else point(stage)
    return Span(role, thread, number, start, end)


def only(seconds):
    return {name: value for name, value in seconds.items() if value}


def test_the_innermost_call_counts_and_the_parts_sum_to_the_whole():
    spans = [span(API, LOOP, 2, 6), span(API, SCHEDULER, 3, 4)]
    seconds = attribute(spans, request())
    assert only(seconds) == {HTTP: 1 + 1 + 4, LOOP: 3, SCHEDULER: 1}
    assert sum(seconds.values()) == 10


def test_the_process_furthest_down_the_way_counts():
    spans = [span(WORKER, PROJECTOR, 2, 5), span(API, LOOP, 3, 6), span(CORE, SCHEDULER, 4, 5.5)]
    assert only(attribute(spans, request())) == {
        HTTP: 1 + 4,
        UNATTRIBUTED: 1,  # no client talks to the model worker
        PROJECTOR: 3,
        SCHEDULER: 0.5,
        LOOP: 0.5,
    }


@pytest.mark.parametrize(
    ("before", "after", "gap"),
    [
        ((API, 1), (CORE, 2), HANDING),
        ((CORE, 2), (WORKER, 3), HANDING),
        ((CORE, 2), (CORE, 4), QUEUE),
        ((API, 1), (API, 5), HANDING),
        ((API, 1), (API, 1), UNATTRIBUTED),
        ((WORKER, 3), (WORKER, 3), UNATTRIBUTED),
    ],
)
def test_time_that_no_call_covers_is_a_hand_over_or_stands_by_itself(before, after, gap):
    (first, one), (second, two) = before, after
    edge = [span(API, LOOP, 1, 1.5), span(API, LOOP, 9, 10)]
    spans = [*edge, span(first, SCHEDULER, 1.5, 3, one), span(second, SCHEDULER, 5, 9, two)]
    assert attribute(spans, request())[gap] == pytest.approx(2)


def test_what_happens_before_and_after_a_request_is_none_of_its_time():
    spans = [span(API, LOOP, -5, 2), span(API, LOOP, 9, 12), span(API, SCHEDULER, 11, 12)]
    ((_, seconds),) = attributed(spans, [request()])
    assert only(seconds) == {LOOP: 3, UNATTRIBUTED: 7}


def test_the_first_pass_of_the_model_is_prefill_and_the_others_are_decoding():
    passes = [Span(WORKER, 1, FORWARD, start, start + 1) for start in (2, 5, 7)]
    seconds = attribute(passes, request(num_tokens=3))
    assert (seconds[PREFILL], seconds[LATER]) == (1, 2)
    with pytest.raises(BenchError, match="3 passes of the model for 2 token"):
        attribute(passes, request(num_tokens=2))


def test_each_request_gets_the_calls_of_its_time():
    first, second = request(), request()
    second = Timed(**{**vars_of(second), "start": 20.0, "sent": 21.0, "end": 30.0})
    spans = [span(API, LOOP, 2, 5), span(API, LOOP, 22, 23)]
    (_, one), (_, two) = attributed(spans, [first, second])
    assert (one[LOOP], two[LOOP]) == (3, 1)


def vars_of(timed):
    return {name: getattr(timed, name) for name in Timed.__dataclass_fields__}


def test_busy_time_has_no_waiting_and_counts_nothing_twice():
    spans = [
        span(API, LOOP, 1, 5),
        span(API, SCHEDULER, 2, 3),
        span(API, CROSSING, 1, 9, thread=7),
        span(IMAGE, stage_points.DECODE, 2, 6),
        span(API, LOOP, 9, 11),
    ]
    assert busy(spans, 0, 10) == {
        (API, LOOP): 3,
        (API, SCHEDULER): 1,
        (IMAGE, stage_points.DECODE): 4,
    }


def test_rows_outlive_their_process_and_a_forked_child_has_its_own(tmp_path):
    clock = StageClock(tmp_path)
    clock.timed(lambda: None, point(SCHEDULER) + 1)()
    child = os.fork()
    if child == 0:
        clock.timed(lambda: None, point(PROJECTOR) + 1)()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    found = {(s.role, s.point) for s in read_spans(tmp_path)}
    assert found == {(CORE, point(SCHEDULER)), (API, point(PROJECTOR))}
    assert all(s.end >= s.start for s in read_spans(tmp_path))


def test_a_call_that_raises_is_noted_and_still_raises(tmp_path):
    clock = StageClock(tmp_path)
    with pytest.raises(ZeroDivisionError):
        clock.timed(lambda: 1 / 0, 1)()
    assert len(read_spans(tmp_path)) == 1


def test_nothing_timed_and_too_much_to_note_are_errors(tmp_path):
    with pytest.raises(BenchError, match="PYTHONPATH"):
        read_spans(tmp_path)
    row = np.frombuffer(ROW.pack(1, 1, 0.0, 1.0), np.uint8)
    np.tile(row, MAX_ROWS).tofile(tmp_path / "1.spans")
    with pytest.raises(BenchError, match="fewer --rounds"):
        read_spans(tmp_path)


_SERVER = """
import asyncio
from serving.bodies import read_json
from serving.logs import configure_logs
from serving.settings import Settings

async def step():
    read_json(b'{"text": "a day"}')
    await asyncio.sleep(0)

async def serve():
    configure_logs(Settings())
    await asyncio.create_task(step())

asyncio.run(serve())
"""


def run_server(**variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    subprocess.run([sys.executable, "-c", _SERVER], env=environment, check=True, cwd=ROOT)


def test_a_process_with_the_hook_notes_its_calls_and_tasks_and_one_without_notes_nothing(tmp_path):
    spans, hook = tmp_path / "spans", tmp_path / "hook"
    spans.mkdir()
    hook.mkdir()
    run_server(**{FOLDER_VARIABLE: str(spans)})
    assert not list(spans.iterdir())
    run_server(**write_hook(hook, ROOT), **{FOLDER_VARIABLE: str(spans)})
    found = read_spans(spans)
    read_json = stage_points.Point("serving.bodies", "read_json", stage_points.PARSE, API)
    (body,) = [s for s in found if s.point == POINTS.index(read_json)]
    steps = [s for s in found if s.point == TASK_STEP]
    first, second, *_ = steps  # and then those that end the loop
    assert first.start <= body.start <= body.end <= first.end <= second.start


def test_every_timed_function_is_where_it_is_looked_for():
    assert stage_points.check_points() == []


def test_every_stage_is_named_once_and_every_point_belongs_to_one():
    assert len(set(STAGES)) == len(STAGES)
    made = {each.stage for each in POINTS} | {HTTP, QUEUE, HANDING, LATER, LOOP}
    assert made == set(STAGES)


def options(*argv):
    return build_parser().parse_args(["stages", *argv])


def parts(seconds_of=lambda ratio: 1.0, rounds=3):
    """Requests of `seconds_of(ratio)`, half of it prefill at 1.0, the rest of it scheduling."""
    found = []
    for turn in range(rounds):
        for ratio in RATIOS:
            end = seconds_of(ratio)
            stages = dict.fromkeys((*STAGES, UNATTRIBUTED), 0.0)
            stages |= {PREFILL: end - 0.5, SCHEDULER: 0.49, UNATTRIBUTED: 0.01}
            tokens = round(100 * ratio)
            timed = request(end, ratio=ratio, turn=turn, num_prompt_tokens=tokens)
            found.append((timed, stages))
    return found


def summarised(found, plain=(), loads=()):
    requests = {TIMED: [timed for timed, _ in found]} | ({PLAIN: plain} if plain else {})
    return stage_table.summarise(found, requests, list(loads), options())


def test_the_table_shows_the_unattributed_and_what_the_named_stages_sum_to():
    outcome = summarised(parts(lambda ratio: 0.5 + 0.5 * ratio))
    rows = {row[0]: row[1:] for row in outcome.rows}
    assert rows[UNATTRIBUTED] == ["10.00"] * 6
    assert rows["sum / end to end"][0] == "0.990"
    assert rows["end to end"][-1] == "525.00"
    assert any("goal of 5% met" in note for note in outcome.notes)


def test_one_slow_request_moves_no_row_and_the_rows_still_add_up():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, (3, 20))
    values[1, 7] += 1000
    *rows, whole = stage_table.levels(values.sum(axis=0), np.vstack([values, values.sum(axis=0)]))
    assert sum(row.ms for row in rows) == pytest.approx(whole.ms)
    assert all(1 < row.low <= row.ms <= row.high < 2 for row in rows)


def test_unattributed_time_over_the_goal_is_said():
    found = parts()
    for _, stages in found:
        stages[SCHEDULER], stages[UNATTRIBUTED] = 0.4, 0.1
    assert any("goal of 5% missed" in note for note in summarised(found).notes)


def test_amdahls_bound_is_what_the_kept_share_of_projector_and_prefill_allows():
    found = summarised(parts(lambda ratio: 0.5 + 0.5 * ratio)).results
    assert found["limit"] == pytest.approx(2)
    assert found["ratios"]["0.2"]["amdahl"] == pytest.approx(1 / 0.6)
    assert found["ratios"]["0.2"]["speedup"]["median"] == pytest.approx(1 / 0.6)
    assert found["ratios"]["1.0"]["amdahl"] is None
    (prefill,) = [s for s in found["ratios"]["1.0"]["stages"] if s["name"] == PREFILL]
    assert prefill["ms"] == pytest.approx(500)


def test_the_cost_of_timing_is_paired_by_round():
    found = parts(lambda ratio: 1.1)
    plain = [Timed(**{**vars_of(timed), "end": 1.0}) for timed, _ in found]
    assert summarised(found, plain).results["overhead"]["median"] == pytest.approx(1.1)
    assert summarised(found).results["overhead"] is None


def test_a_load_says_who_was_busy():
    load = Load(
        ratio=0.4,
        posts=10,
        start=0,
        end=2,
        processor_s={API: 1.8, WORKER: 0.4},
        busy_s={(API, LOOP): 0.5},
    )
    outcome = summarised(parts(), loads=[load])
    assert any(f"5.0 posts/s; cores: {API} 0.90" in note for note in outcome.notes)
    (stored,) = json.loads(json.dumps(outcome.as_json()))["results"]["saturated"]
    assert stored["busy"] == [{"role": API, "stage": LOOP, "ms_a_post": pytest.approx(50)}]


def test_no_two_posts_are_alike_and_a_body_is_one_of_our_api():
    from serving.schema import LabelRequest

    question = Question(model=None, structure="llavac", size=(64, 48), seed=0)
    bodies = {question.body(number, 0.4) for number in range(5)}
    assert len(bodies) == 5
    asked = LabelRequest(**json.loads(question.body(0, 0.4)))
    assert (asked.retention_ratio, asked.label_structure) == (0.4, "llavac")


@pytest.mark.parametrize("model", [CLIP_L, LLAVA])
def test_a_shape_without_weights_is_a_model_that_the_server_accepts(model, tmp_path):
    from serving.adapters import read_base
    from serving.server import check_model, load_tokenizer

    (_, base, *_), variables = _checkpoint(tmp_path, model)
    check_model(base)
    assert read_base(base).image_mode == "crop"
    assert load_tokenizer(base).encode("a day") != []
    assert variables


@pytest.mark.parametrize(
    ("argv", "word"), [(["--saturated", "-1"], "--saturated"), (["--structure", "x"], "invalid")]
)
def test_arguments_that_cannot_be_used_end_with_2(argv, word, capsys):
    try:
        status = main(["stages", *argv])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert word in capsys.readouterr().err
