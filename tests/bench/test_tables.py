import pytest

from bench.outcome import Outcome
from bench.statistics import Sample
from bench.tables import markdown_table


def test_columns_line_up_and_numbers_are_right_aligned():
    lines = markdown_table(["variant", "ms"], [["a", 1.23456], ["longer name", 12]]).splitlines()
    assert lines == [
        "| variant     |   ms |",
        "| ----------- | ---: |",
        "| a           | 1.23 |",
        "| longer name |   12 |",
    ]


def test_a_pipe_or_line_break_in_a_cell_does_not_break_the_table():
    lines = markdown_table(["a"], [["x|y\nz"]]).splitlines()
    assert lines[-1] == "| x\\|y z |"
    assert len(lines) == 3


def test_a_table_without_rows_has_its_head():
    assert markdown_table(["name", "n"], []).count("\n") == 1


def test_a_short_row_is_refused():
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        markdown_table(["a", "b"], [["x"]])


def test_an_outcome_prints_its_notes_and_stores_its_samples():
    outcome = Outcome(
        title="T",
        headers=["a"],
        rows=[["x"]],
        notes=["first", "second"],
        settings={"rounds": 1},
        results={"x": 1.0},
        samples=[Sample(round=0, variant="x", seconds=0.5)],
    )
    assert outcome.markdown().startswith("### T\n\n| a")
    assert outcome.markdown().endswith("\n- first\n- second")
    assert outcome.as_json()["samples"] == [{"round": 0, "variant": "x", "seconds": 0.5}]
