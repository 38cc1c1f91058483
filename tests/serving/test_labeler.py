"""Probabilities and labels against exhaustive scoring; precedence of settings."""

import math
from collections import defaultdict

import outlines_core as oc
import pytest

from patches.canonical import compile_index
from patches.config import Retention
from serving.adapters import InstalledAdapter
from serving.catalogue import Catalogue, Choices
from serving.errors import BadRequestError, ConfigError, UnknownModelError
from serving.labeler import Labeler
from serving.manifest import Manifest
from serving.protocol import Adapter
from serving.structures import STRUCTURES, make_structure
from tests.serving.fake_engine import EOS, FakeEngine

SHARED = make_structure(
    "shared",
    {
        "fields": {
            "verdict": ["very good", "very bad", "very", "very good day", "good", "bad"],
            "tone": ["good", "bad", "bad day"],
        },
        "answer": "{verdict}: {tone}",
        "prompt": "{text}",
    },
)
TAIL = make_structure(
    "tail",
    {"fields": {"a": ["good", "bad"]}, "answer": "a {a} day", "prompt": "{text}"},
)
ALONE = make_structure("alone", {"fields": {"only": ["good"]}, "prompt": "{text}"})
STRUCTURES_UNDER_TEST = {**STRUCTURES, "shared": SHARED, "tail": TAIL, "alone": ALONE}


def catalogue(adapters=None, **settings):
    installed = {
        name: InstalledAdapter(adapter=Adapter(name=name, path=name, rank=8), manifest=manifest)
        for name, manifest in (adapters or {}).items()
    }
    defaults = {"structure": "sentiment", "retention": Retention(ratio=0.8)}
    return Catalogue(
        base="base",
        adapters=installed,
        structures=STRUCTURES_UNDER_TEST,
        **{**defaults, **settings},
    )


def exhaustive(engine, labeler, prompt_ids, structure):
    """Probability of each label of each field, by scoring every allowed answer id by id."""
    constraint = labeler.constraints[structure.name]
    conditional = {}
    answers = list(structure.answers())
    mass = {}
    for answer in answers:
        guide = oc.Guide(compile_index(constraint.pattern, EOS))
        prefix, logprob = list(prompt_ids), 0.0
        for token_id in [*constraint.answer_ids(answer), EOS]:
            logprob += engine.distribution(prefix, guide.get_tokens())[token_id]
            if token_id != EOS:
                guide.advance(token_id)
                prefix.append(token_id)
        mass[tuple(answer.values())] = math.exp(logprob)
    assert math.isclose(sum(mass.values()), 1.0, rel_tol=1e-9)
    answered = ()
    labels = {}
    for index, field in enumerate(structure.fields):
        sums = defaultdict(float)
        for values, weight in mass.items():
            if values[:index] == answered:
                sums[values[index]] += weight
        total = sum(sums.values())
        conditional[field] = {label: value / total for label, value in sums.items()}
        labels[field] = None
        answered = (*answered, labeler_greedy(engine, labeler, prompt_ids, structure)[field])
    return conditional


def labeler_greedy(engine, labeler, prompt_ids, structure):
    """Labels of the plain greedy decode, spelled out and parsed as text."""
    constraint = labeler.constraints[structure.name]
    guide = oc.Guide(compile_index(constraint.pattern, EOS))
    prefix = list(prompt_ids)
    while True:
        step = engine.distribution(prefix, guide.get_tokens())
        best = max(step, key=step.get)
        if best == EOS:
            break
        guide.advance(best)
        prefix.append(best)
    return structure.parse(labeler.tokenizer.decode(prefix[len(prompt_ids) :]))


@pytest.mark.parametrize("name", STRUCTURES_UNDER_TEST)
@pytest.mark.parametrize("seed", range(6))
async def test_probabilities_equal_exhaustive_scoring(name, seed, published_tokenizer):
    engine = FakeEngine(seed)
    labeler = Labeler(engine, catalogue(), published_tokenizer)
    structure = STRUCTURES_UNDER_TEST[name]
    result = await labeler.label("a day in park", [], Choices(label_structure=name))
    prompt_ids = engine.requests[0].prompt_ids
    assert result.scores.labels == labeler_greedy(engine, labeler, prompt_ids, structure)
    expected = exhaustive(engine, labeler, prompt_ids, structure)
    for field, probabilities in expected.items():
        assert result.scores.probabilities[field] == pytest.approx(probabilities, abs=1e-9)
        assert sum(result.scores.probabilities[field].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", STRUCTURES)
async def test_labels_without_shared_first_ids_take_one_pass(name, published_tokenizer):
    labeler = Labeler(FakeEngine(), catalogue(), published_tokenizer)
    result = await labeler.label("x", [], Choices(label_structure=name))
    assert result.num_passes == 1


async def test_decoding_stops_at_the_last_undecided_step(published_tokenizer):
    labeler = Labeler(FakeEngine(), catalogue(), published_tokenizer)
    steps = {name: c.num_steps for name, c in labeler.constraints.items()}
    assert steps["sentiment"] == 1
    assert steps["llavac"] == 5  # label, comma, label, comma, label; no end token
    assert steps["alone"] == 0


@pytest.mark.parametrize("name", STRUCTURES_UNDER_TEST)
def test_the_pattern_admits_exactly_the_canonical_answers(name, published_tokenizer):
    labeler = Labeler(FakeEngine(), catalogue(), published_tokenizer)
    structure, constraint = STRUCTURES_UNDER_TEST[name], labeler.constraints[name]
    index = compile_index(constraint.pattern, EOS)
    found, stack = set(), [(index.get_initial_state(), ())]
    while stack:
        state, ids = stack.pop()
        if index.is_final_state(state):
            found.add(ids)
        for token_id in index.get_allowed_tokens(state):
            if token_id != EOS:
                stack.append((index.get_next_state(state, token_id), (*ids, token_id)))
    wanted = {tuple(labeler.answer_ids(structure.render(a))) for a in structure.answers()}
    assert found == wanted


def test_settings_come_from_request_then_manifest_then_server():
    manifest = Manifest(label_structure="llavac", retention_ratio=0.4, selector="stride")
    shop = catalogue({"tuned": manifest, "bare": Manifest()})
    tuned = shop.resolve(Choices(model="tuned"))
    assert (tuned.structure.name, tuned.retention) == (
        "llavac",
        Retention(ratio=0.4, selector="stride"),
    )
    bare = shop.resolve(Choices(model="bare"))
    assert (bare.structure.name, bare.retention) == ("sentiment", Retention(ratio=0.8))
    asked = shop.resolve(Choices(model="tuned", retention_ratio=0.1, label_structure="shared"))
    assert (asked.structure.name, asked.retention.ratio) == ("shared", 0.1)
    assert asked.retention.selector == "stride"
    assert shop.resolve(Choices()).adapter is None


def test_unknown_names_are_refused_with_those_there_are():
    shop = catalogue({"tuned": Manifest()})
    with pytest.raises(UnknownModelError, match="'tuned'"):
        shop.resolve(Choices(model="../tuned"))
    with pytest.raises(BadRequestError, match=r"label_structure='no'.*llavac"):
        shop.resolve(Choices(label_structure="no"))
    with pytest.raises(BadRequestError) as caught:
        shop.resolve(Choices(selector="no"))
    assert caught.value.param == "selector"


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        ({"base": Manifest()}, {}, "base model's name"),
        ({"a": Manifest(label_structure="no")}, {}, "needs label structure 'no'"),
        ({"a": Manifest(selector="no")}, {}, "adapter 'a': selector='no'"),
        ({"a": Manifest(label_structure=SHARED.model_copy(update={"prompt": "x {text}"}))}, {},
         "differently"),
        ({}, {"structure": "no"}, "unknown"),
    ],
)  # fmt: skip
def test_a_catalogue_that_cannot_work_is_refused_at_start(adapters, settings, message):
    with pytest.raises(ConfigError, match=message):
        catalogue(adapters, **settings)


def test_an_adapter_may_bring_its_own_structure():
    own = make_structure("own", {"fields": {"x": ["a", "b"]}, "prompt": "{text}"})
    shop = catalogue({"a": Manifest(label_structure=own)})
    assert shop.resolve(Choices(model="a")).structure.name == "own"


def test_a_structure_whose_answers_cannot_be_told_apart_is_refused(published_tokenizer):
    twice = make_structure(
        "twice",
        {
            "fields": {"a": ["very", "very good"], "b": ["good bad", "bad"]},
            "answer": "{a} {b}",
            "prompt": "{text}",
        },
    )
    shop = Catalogue(
        base="base",
        adapters={},
        structures={"twice": twice},
        structure="twice",
        retention=Retention(),
    )
    with pytest.raises(ConfigError, match="twice.a='very' cannot be told from a longer label"):
        Labeler(FakeEngine(), shop, published_tokenizer)
