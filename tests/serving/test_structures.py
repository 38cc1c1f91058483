"""Structures as values: rendering, parsing, YAML, and clear refusals."""

import pytest

from serving.errors import BadRequestError, ConfigError
from serving.structures import STRUCTURES, find_structure, load_structures, make_structure


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_every_answer_parses_back_and_matches_the_outlines_type(structure):
    answers = list(structure.answers())
    assert len(answers) == structure.num_answers
    for labels in answers:
        text = structure.render(labels)
        assert structure.parse(text) == labels
        assert structure.output_type.matches(text)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("text", ["", "great", "positive,", "positive positive", "Positive"])
def test_what_is_no_answer_does_not_parse(structure, text):
    assert structure.parse(text) is None


def test_llavac_answers_as_the_paper_writes_them():
    labels = {"image": "positive", "text": "neutral", "multimodal": "positive"}
    assert STRUCTURES["llavac"].render(labels) == "positive, neutral, positive"


def test_a_label_that_is_not_allowed_cannot_be_rendered():
    with pytest.raises(ConfigError, match=r"sentiment.sentiment='great' is not one of"):
        STRUCTURES["sentiment"].render({"sentiment": "great"})


def test_yaml_structures_load_with_any_fields_and_labels(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        'stance:\n  fields: {stance: [in favour, against], sure: ["yes", "no"]}\n'
        '  prompt: "Claim: {text}"\n  answer: "{stance} ({sure})"\n'
    )
    stance = load_structures(path)["stance"]
    assert stance.parse("in favour (no)") == {"stance": "in favour", "sure": "no"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"fields": {}, "prompt": "{text}"}, "at least one field"),
        ({"fields": {"a": []}, "prompt": "{text}"}, "0 labels"),
        ({"fields": {"a": ["x", "x"]}, "prompt": "{text}"}, "twice"),
        ({"fields": {"a": [" x"]}, "prompt": "{text}"}, "space around"),
        ({"fields": {"a b": ["x"]}, "prompt": "{text}"}, "letters, digits"),
        ({"fields": {"a": ["x"]}, "prompt": "no place"}, "must hold {text}"),
        ({"fields": {"a": ["x"]}, "prompt": "{text}", "answer": "{b}"}, "must name the fields"),
        ({"fields": {"a": ["x"], "b": ["y"]}, "prompt": "{text}", "answer": "{a}{b}"}, "between"),
        ({"fields": {"a": ["x"]}, "prompt": "{text}", "colour": 1}, "colour"),
        ({"prompt": "{text}"}, "fields"),
        ([1], "expected fields"),
    ],
)
def test_a_structure_that_cannot_work_says_why(entry, message):
    with pytest.raises(ConfigError, match=message):
        make_structure("mine", entry)


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="label structures"):
        load_structures(path)


def test_an_unknown_structure_is_named_with_the_known_ones():
    with pytest.raises(BadRequestError, match=r"'x' is unknown; allowed are .*'llavac'"):
        find_structure(STRUCTURES, "x")
