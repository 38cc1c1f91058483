"""A merged checkpoint is the base with the adapter, in Hugging Face and in vLLM."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from serving.catalogue import Choices
from serving.errors import ConfigError
from serving.probes import questions
from serving.settings import DEMO
from serving.structures import STRUCTURES
from tests.running import RunningServer
from tests.train.runs import make_run
from train.export import ExportOptions, export
from train.merge import merge
from train.model import load_llava
from train.probes import answers
from train.sight import Sight

ADAPTER = DEMO / "adapters" / "llavac"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost more than they bring on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    options = ExportOptions(
        run=make_run(folder / "run"),
        out=folder / "adapters" / "mine",
        merged=folder / "whole",
        is_verified=False,
    )
    export(options)
    assert {path.name for path in folder.iterdir()} == {"run", "adapters", "whole"}
    return folder / "whole"


@pytest.fixture(scope="module")
def expected():
    model = load_llava(DEMO / "base", ADAPTER)
    return answers(model, STRUCTURES["llavac"], questions(2), Sight(model))


def test_it_answers_as_base_and_adapter_do(merged, expected):
    model = load_llava(merged)
    found = answers(model, STRUCTURES["llavac"], questions(2), Sight(model))
    for one, other in zip(found, expected, strict=True):
        for field, labels in other.items():
            assert one[field] == pytest.approx(labels, abs=1e-4)


def test_it_is_a_published_checkpoint_with_the_bases_files(merged):
    names = {path.name for path in (DEMO / "base").iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (DEMO / "base" / name).read_bytes()
    with (
        safe_open(merged / "model.safetensors", "pt") as one,
        safe_open(DEMO / "base" / "model.safetensors", "pt") as other,
    ):
        assert set(one.keys()) == set(other.keys())
        changed = {name for name in one.keys() if not torch.equal(one.get_tensor(name), other.get_tensor(name))}  # fmt: skip  # noqa: E501, SIM118
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)


def test_weights_keep_the_bases_precision(tmp_path):
    base = shutil.copytree(DEMO / "base", tmp_path / "base")
    path = base / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    merge(base, ADAPTER, tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_an_adapter_of_another_base_does_not_merge(published, tmp_path):
    with pytest.raises(ConfigError, match="does not merge"):
        merge(published, ADAPTER, tmp_path / "whole")


@pytest.mark.long
def test_vllm_serves_it_with_the_same_answers(merged, expected):
    with RunningServer(model=str(merged), dtype="float32") as server:
        for probe, wanted in zip(questions(2), expected, strict=True):
            images = [probe.picture.paint()] if probe.picture else []
            choices = Choices(label_structure="llavac", retention_ratio=probe.ratio)
            result = server.call(server.labeler.label(probe.text, images, choices))
            for field, labels in wanted.items():
                found = result.scores.probabilities[field]
                probabilities = {label: pytest.approx(torch.tensor(value).exp().item(), abs=1e-4) for label, value in labels.items()}  # fmt: skip  # noqa: E501
                assert found == probabilities
