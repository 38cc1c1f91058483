"""Export and verify with the real models: Hugging Face on one side, vLLM on the other."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.export
from serving.errors import ConfigError
from serving.probes import load_probes
from serving.prompts import encode, render_prompt
from serving.settings import DEMO
from serving.structures import STRUCTURES
from tests.train.runs import make_run
from train.answers import allowed_answers
from train.export import ExportOptions, export
from train.probes import is_clear, make_probes
from train.reference import Reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost more than they bring on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo's adapter, exported without asking vLLM."""
    folder = tmp_path_factory.mktemp("exported")
    run = make_run(folder / "run")
    return export(ExportOptions(run=run, out=folder / "adapters" / "mine", is_verified=False))


def tamper(folder):
    """A hundredth more of one factor: too little to see in labels."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "v_proj.lora_B" in name)
    save_file({**weights, name: 1.01 * weights[name]}, path)


def serving_verify(*arguments):
    command = [sys.executable, "-m", "serving", "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_probes_are_what_hugging_face_says_said_plainly(exported):
    """The yardstick has its own tower, prompt and probabilities."""
    probes = load_probes(exported)
    assert {probe.ratio for probe in probes.probes} == {1.0, 0.4}
    assert any(probe.picture is None for probe in probes.probes)
    for adapter in (None, exported):
        yardstick = Reference(DEMO / "base", adapter)
        for probe in probes.probes:
            answers = probe.answers.adapter if adapter else probe.answers.base
            assert is_clear(answers)
            expected = plain_answers(yardstick, probe)
            for field, labels in expected.items():
                assert answers[field] == pytest.approx(labels, abs=1e-4)


def plain_answers(yardstick, probe):
    """Log-probabilities of labels that differ in their last id, along the best path."""
    tokenizer, structure = yardstick.tokenizer, STRUCTURES["llavac"]
    images = [probe.picture.paint()] if probe.picture else []
    prompt = encode(tokenizer, render_prompt(tokenizer, structure, probe.text, len(images)))
    paths, answered, found = allowed_answers(tokenizer, structure), {}, {}
    for field, labels in structure.fields.items():
        rows = {
            label: next(
                ids
                for ids, other in paths.items()
                if {**answered, field: label}.items() <= other.items()
            )
            for label in labels
        }
        ids = [rows[label] for label in labels]
        step = next(i for i, column in enumerate(zip(*ids, strict=True)) if len(set(column)) > 1)
        scored = yardstick.score(images, prompt, ids[0], ratio=probe.ratio)
        row = scored.logprobs[step, [one[step] for one in ids]].log_softmax(dim=-1)
        found[field] = dict(zip(labels, row.tolist(), strict=True))
        answered[field] = max(found[field], key=found[field].get)
    return found


def test_verify_tells_a_good_adapter_from_a_tampered_one(exported, tmp_path):
    """One engine for all: as exported, changed after its probes, and somebody else's."""
    tampered = shutil.copytree(exported, tmp_path / "tampered")
    tamper(tampered)
    foreign = shutil.copytree(DEMO / "adapters" / "sentiment", tmp_path / "foreign")
    (foreign / "sieve.json").unlink()
    done = serving_verify(exported, tampered, foreign, "--json")
    assert done.returncode == 1, done.stderr
    good, bad, other = json.loads(done.stdout)
    assert good["is_good"]
    assert good["largest_error"] < 1e-3
    assert good["change"] > 0.1
    assert not bad["is_good"]
    assert {row["model"] for row in bad["differences"]} == {"tampered"}
    assert other["is_good"]
    assert not other["has_answers"]
    assert "adapter 'foreign' has no sieve.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_export_ends_well_only_where_vllm_agrees(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    out = tmp_path / "adapters" / "mine"
    assert export(ExportOptions(run=run, out=out)) == out

    def then_tampered(structure, base, folder):
        probes = make_probes(structure, base, folder)
        tamper(folder)
        return probes

    monkeypatch.setattr(train.export, "make_probes", then_tampered)
    with pytest.raises(ConfigError, match=r"not exported:[\s\S]*other: FAILED[\s\S]*expected"):
        export(ExportOptions(run=run, out=out.with_name("other")))
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_log_probabilities_of_probes_sum_to_one(exported):
    for probe in load_probes(exported).probes:
        for labels in (*probe.answers.base.values(), *probe.answers.adapter.values()):
            assert sum(map(math.exp, labels.values())) == pytest.approx(1.0, abs=1e-5)
