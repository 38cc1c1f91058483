import shutil

import pytest
import torch
from safetensors.torch import load_file

from serving.errors import ConfigError
from serving.manifest import fingerprint
from train.__main__ import main
from train.demo.build import SHIPPED
from train.demo.dataset import demo_posts
from train.demo.export import export_mvsa
from train.fold import PROJECTOR, write_folded
from train.model import load_llava

BASE = SHIPPED / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posts")
    export_mvsa(demo_posts(48, split="train", balanced=True, seed=5), folder)
    return folder


@pytest.fixture(scope="module")
def folded(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("folded") / "base"
    command = ["fold", "--base", str(BASE), "--data", str(data), "--out", str(out)]
    assert main([*command, "--threads", "1", "--set", "batch_size=16", "micro_batch_size=8"]) == 0
    return out


def test_only_the_projector_differs_from_the_base(folded):
    before, after = (load_file(path / "model.safetensors") for path in (BASE, folded))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(PROJECTOR in name for name in changed)


def test_it_loads_and_is_another_base_to_adapters(folded):
    assert fingerprint(folded) != fingerprint(BASE)
    load_llava(folded)


def test_an_adapter_with_a_full_projector_is_refused(data, tmp_path, capsys):
    command = ["fit", "projector", "--base", str(BASE), "--data", str(data)]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "train fold" in capsys.readouterr().err


def test_a_folder_that_is_there_is_never_written_over(data, folded, capsys):
    command = ["fold", "--base", str(BASE), "--data", str(data), "--out", str(folded)]
    before = fingerprint(folded)
    assert main(command) == 2
    assert "there already" in capsys.readouterr().err
    assert fingerprint(folded) == before


def test_a_base_without_such_weights_leaves_nothing_behind(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    weights = {f"{PROJECTOR}.linear_9.weight": torch.zeros(2, 2)}
    with pytest.raises(ConfigError, match="linear_9"):
        write_folded(tmp_path / "base", weights, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
