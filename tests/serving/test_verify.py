"""What `serving verify` finds and says, on an engine without a model."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from patches.config import Retention
from serving.adapters import check_adapter, read_base
from serving.catalogue import Catalogue
from serving.cli import parse_command
from serving.errors import AdapterError, ConfigError
from serving.labeler import Labeler
from serving.probes import Answers, Picture, Probe, Probes, load_probes, questions
from serving.settings import DEMO
from serving.structures import STRUCTURES
from serving.verify import TOLERANCE, ask, verify
from tests.serving.fake_engine import FakeEngine


class TwoModels(FakeEngine):
    """An adapter is another model; where `is_deaf`, it is the base itself."""

    def __init__(self, is_deaf=False):
        super().__init__()
        self._is_deaf = is_deaf

    async def generate(self, request):
        self.seed = 0 if request.adapter is None or self._is_deaf else 1
        return await super().generate(request)


@pytest.fixture
def labeler(demo_tokenizer):
    return make_labeler(demo_tokenizer)


def make_labeler(tokenizer, **engine):
    catalogue = Catalogue(
        base="base",
        adapters={
            folder.name: check_adapter(folder, read_base(str(DEMO / "base")))
            for folder in (DEMO / "adapters").iterdir()
        },
        structures=STRUCTURES,
        structure="sentiment",
        retention=Retention(),
    )
    return Labeler(TwoModels(**engine), catalogue, tokenizer)


async def answered(labeler, change=0.0):
    """Probes with the engine's own answers, the adapter's first one changed."""
    asked = Probes(structure="llavac", probes=tuple(questions(1)))
    probes = []
    for probe in asked.probes:
        base = await ask(labeler, "base", asked, probe)
        tuned = await ask(labeler, "llavac", asked, probe)
        tuned["image"]["positive"] += change
        answers = Answers(base=base, adapter=tuned)
        probes.append(probe.model_copy(update={"answers": answers}))
    return Probes(structure="llavac", probes=tuple(probes))


async def test_an_adapter_that_answers_as_trained_is_good(labeler):
    verdict = await verify(labeler, "llavac", await answered(labeler))
    assert verdict.is_good
    assert verdict.largest_error == pytest.approx(0.0)
    assert verdict.change > 0.1
    assert "ok" in next(verdict.lines())


@pytest.mark.parametrize("change", [2 * TOLERANCE, -2 * TOLERANCE, 1.0])
async def test_an_adapter_that_answers_otherwise_is_not(labeler, change):
    verdict = await verify(labeler, "llavac", await answered(labeler, change))
    assert not verdict.is_good
    assert verdict.largest_error == pytest.approx(abs(change))
    assert {(row.model, row.field, row.label) for row in verdict.differences} == {
        ("llavac", "image", "positive")
    }
    report = "\n".join(verdict.lines())
    assert "llavac: FAILED" in report
    assert "expected" in report


async def test_differences_within_the_tolerance_are_none(labeler):
    verdict = await verify(labeler, "llavac", await answered(labeler, 1e-4))
    assert verdict.is_good


async def test_a_label_that_only_one_side_has_is_a_difference(labeler):
    probes = await answered(labeler)
    del probes.probes[0].answers.base["text"]["neutral"]
    verdict = await verify(labeler, "llavac", probes)
    assert [row.expected for row in verdict.differences] == [None]
    assert "none" in "\n".join(verdict.lines())


@pytest.mark.parametrize("has_answers", [True, False])
async def test_an_adapter_that_does_nothing_is_not_good(demo_tokenizer, has_answers):
    labeler = make_labeler(demo_tokenizer, is_deaf=True)
    verdict = await verify(labeler, "llavac", await answered(labeler) if has_answers else None)
    assert not verdict.is_good
    assert not verdict.differences
    assert "does nothing" in "\n".join(verdict.lines())


async def test_without_probes_only_the_difference_from_the_base_is_checked_and_said(labeler):
    verdict = await verify(labeler, "llavac", None)
    assert verdict.is_good
    assert verdict.largest_error is None
    assert "no probes.json" in "\n".join(verdict.lines())


async def test_a_long_table_is_cut(labeler):
    probes = await answered(labeler)
    nonsense = {"image": {f"label {index}": -1.0 for index in range(50)}}
    wrong = [
        probe.model_copy(update={"answers": Answers(base=nonsense, adapter=nonsense)})
        for probe in probes.probes
    ]
    verdict = await verify(labeler, "llavac", Probes(structure="llavac", probes=tuple(wrong)))
    lines = list(verdict.lines())
    assert lines[-1].endswith("more")
    assert len(lines) < 30


def test_a_picture_is_the_same_wherever_it_is_painted():
    image = Picture(seed=3, width=24, height=16).paint()
    assert image.size == (24, 16)
    assert image.getpixel((0, 0)) == (248, 194, 190)
    assert np.asarray(image).std() > 40
    assert image.tobytes() == Picture(seed=3, width=24, height=16).paint().tobytes()
    assert image.tobytes() != Picture(seed=4, width=24, height=16).paint().tobytes()


def test_questions_have_pictures_that_are_not_square_and_ratios_below_one():
    asked = questions(3)
    assert {probe.ratio for probe in asked} == {1.0, 0.4}
    pictures = [probe.picture for probe in asked if probe.picture]
    assert {math.copysign(1, p.width - p.height) for p in pictures if p.width != p.height} == {
        1,
        -1,
    }
    assert any(probe.picture is None for probe in asked)


def test_probes_are_read_back_as_written(tmp_path):
    answers = Answers(base={"sentiment": {"positive": -0.1}}, adapter={"sentiment": {}})
    probes = Probes(
        structure="sentiment", probes=(Probe(text="x", picture=None, ratio=0.4, answers=answers),)
    )
    probes.save(tmp_path)
    assert load_probes(tmp_path) == probes
    assert load_probes(tmp_path.parent) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{}",
        b'{"structure": "x", "probes": []}',
        b'{"structure": "x", "probes": [{"text": "", "ratio": 1.0}]}',
        b'{"structure": "x", "more": 1, "probes": [{"text": "", "ratio": 1.0}]}',
    ],
)
def test_broken_probes_are_refused(tmp_path, content):
    (tmp_path / "probes.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"probes\.json"):
        load_probes(tmp_path)


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan"])
def test_a_tolerance_that_nothing_passes_is_refused(tolerance):
    with pytest.raises(ConfigError, match="tolerance"):
        parse_command(["verify", "mine", "--tolerance", tolerance])


async def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    engine = SimpleNamespace(start=lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setattr("serving.engine.VllmEngine", engine)

    async def failing(*adapters):
        with pytest.raises(ConfigError) as caught:
            await parse_command(["verify", *map(str, adapters)])()
        return caught.value.message

    assert "is no folder" in await failing(tmp_path / "no")
    assert "adapter_config.json cannot be read" in await failing(tmp_path)
    llavac = DEMO / "adapters" / "llavac"
    assert "two adapters are called" in await failing(llavac, llavac)


async def test_probes_of_a_structure_that_nobody_has_are_refused(tmp_path):
    mine = shutil.copytree(DEMO / "adapters" / "llavac", tmp_path / "mine")
    answers = {"base": {"x": {"a": 0.0}}, "adapter": {"x": {"a": 0.0}}}
    probe = {"text": "", "ratio": 1.0, "answers": answers}
    (mine / "probes.json").write_text(json.dumps({"structure": "mood", "probes": [probe]}))
    with pytest.raises(ConfigError, match="'mood'"):
        await parse_command(["verify", str(mine)])()
