"""Adapters that would fail, or do nothing without a word, are refused with the reason."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.adapters import check_adapter, lora_room, read_base
from serving.errors import AdapterError, ConfigError
from serving.manifest import Manifest, RetentionPoint, Trained, fingerprint, read_image_mode
from serving.settings import Settings
from tests.checkpoints import build_adapter, write_processor


@pytest.fixture(scope="module")
def base(published):
    return read_base(str(published))


@pytest.fixture
def adapter(published_adapters, tmp_path):
    return shutil.copytree(published_adapters / "first", tmp_path / "mine")


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_good_adapters_are_found_with_rank_and_manifest(published_adapters, base):
    found = {name: check_adapter(published_adapters / name, base) for name in ("first", "second")}
    assert {name: item.adapter.rank for name, item in found.items()} == {"first": 8, "second": 16}
    assert found["first"].manifest == Manifest()


def test_a_manifest_is_read_back_as_written(adapter, base, published):
    manifest = Manifest(
        label_structure="llavac",
        base_model="base",
        base_fingerprint=fingerprint(published),
        image_mode="crop",
        recipe="llavac",
        trained=Trained(data="posts", num_posts=3, labels={"text": {"positive": 3}}, rank=8),
        retention_ratio=0.4,
        margin=0.01,
        retention_curve=[RetentionPoint(selector="cls", ratio=0.4, macro_f1=0.9)],
        notes=["by LoRA"],
        quality={"test": {"accuracy": 0.97}},
    )
    manifest.save(adapter)
    assert check_adapter(adapter, base).manifest == manifest


def test_what_clients_see_of_a_manifest_is_what_it_says_and_nothing_empty():
    assert Manifest().provenance() == {"retention_curve": [], "notes": []}
    shown = Manifest(recipe="llavac", trained=Trained(seed=1), base_fingerprint="0").provenance()
    assert shown["recipe"] == "llavac"
    assert shown["trained"] == {"seed": 1}
    assert "base_fingerprint" not in shown


def test_an_adapter_without_a_manifest_gets_defaults_and_a_warning(adapter, base, caplog):
    with caplog.at_level(logging.WARNING, logger="serving"):
        assert check_adapter(adapter, base).manifest == Manifest()
    assert "'mine' has no sieve.json" in caplog.text
    caplog.clear()
    Manifest().save(adapter)
    check_adapter(adapter, base)
    assert not caplog.records


def test_an_adapter_of_the_other_image_mode_is_refused(adapter, published, tmp_path):
    padded = shutil.copytree(published, tmp_path / "padded")
    write_processor(padded, pad_to_square=True)
    assert (read_image_mode(published), read_image_mode(padded)) == ("crop", "pad")
    for mode, served in (("pad", published), ("crop", padded)):
        Manifest(image_mode=mode, base_fingerprint=fingerprint(published)).save(adapter)
        with pytest.raises(AdapterError, match=f"image_mode='{mode}'"):
            check_adapter(adapter, read_base(str(served)))
        other = padded if served == published else published
        assert check_adapter(adapter, read_base(str(other))).manifest.image_mode == mode


def test_a_checkpoint_without_image_processor_is_refused(published, tmp_path):
    bare = shutil.copytree(published, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"'bare' has no readable preprocessor_config\.json"):
        read_base(str(bare))


@pytest.fixture(scope="module")
def projector_adapter(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("projector") / "sharp"
    targets = r".*(language_model.*\.(q_proj|v_proj)|multi_modal_projector\.linear_\d)"
    return build_adapter(published, folder, seed=5, target_modules=targets)


@pytest.mark.parametrize("prefix", ["model.multi_modal_projector", "multi_modal_projector"])
def test_adapters_on_the_projector_are_accepted_and_known(
    projector_adapter, base, tmp_path, prefix
):
    folder = shutil.copytree(projector_adapter, tmp_path / "sharp")
    change_weights(
        folder,
        lambda w: {k.replace("model.multi_modal_projector", prefix): v for k, v in w.items()},
    )
    adapter = check_adapter(folder, base).adapter
    assert adapter.has_projector
    assert lora_room(Settings(), [adapter]).has_projector


def test_an_adapter_on_the_language_model_alone_needs_no_projector(adapter, base):
    plain = check_adapter(adapter, base).adapter
    assert not lora_room(Settings(), [plain]).has_projector


def test_projector_weights_of_another_shape_are_refused(projector_adapter, base, tmp_path):
    folder = shutil.copytree(projector_adapter, tmp_path / "sharp")
    change_weights(
        folder,
        lambda w: {k: v[:, :-1].clone() if "linear_1.lora_A" in k else v for k, v in w.items()},
    )
    with pytest.raises(AdapterError, match=r"linear_1\.lora_A.*has shape"):
        check_adapter(folder, base)


def test_weights_for_the_tower_are_refused(adapter, base):
    change_weights(
        adapter,
        lambda w: {k.replace("language_model", "vision_tower.encoder"): v for k, v in w.items()},
    )
    with pytest.raises(AdapterError, match="tower is always frozen"):
        check_adapter(adapter, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["multi_modal_projector"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 1024}, "rank 1024"),
        ({"r": 16}, "has shape"),
    ],
)
def test_what_vllm_cannot_apply_is_refused(adapter, base, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        check_adapter(adapter, base)


def test_keys_of_a_text_only_model_are_refused(adapter, base):
    change_weights(
        adapter, lambda w: {k.replace("model.language_model.", "model."): v for k, v in w.items()}
    )
    with pytest.raises(AdapterError, match="no place for, so it would be ignored"):
        check_adapter(adapter, base)


def test_layers_that_the_base_does_not_have_are_refused(adapter, base):
    change_weights(
        adapter, lambda w: {k.replace("layers.1.", "layers.9."): v for k, v in w.items()}
    )
    with pytest.raises(AdapterError, match=r"layers\.9"):
        check_adapter(adapter, base)


def test_an_adapter_of_zeros_is_refused(adapter, base):
    change_weights(
        adapter,
        lambda w: {k: torch.zeros_like(v) if ".lora_B" in k else v for k, v in w.items()},
    )
    with pytest.raises(AdapterError, match="would do nothing"):
        check_adapter(adapter, base)


def test_one_acting_module_is_enough(adapter, base):
    change_weights(
        adapter,
        lambda w: {
            k: torch.zeros_like(v) if ".lora_B" in k and "q_proj" not in k else v
            for k, v in w.items()
        },
    )
    assert check_adapter(adapter, base).adapter.name == "mine"


def test_an_adapter_of_another_base_is_refused(adapter, base):
    Manifest(base_model="other", base_fingerprint="0" * 32).save(adapter)
    with pytest.raises(AdapterError, match="another base .'other'"):
        check_adapter(adapter, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "sieve.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, b"[]"])
def test_broken_files_are_refused(adapter, base, name, content):
    (adapter / name).write_bytes(content)
    with pytest.raises(AdapterError, match="mine"):
        check_adapter(adapter, base)


def test_missing_weights_are_refused(adapter, base):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="missing"):
        check_adapter(adapter, base)
