"""Nothing that is loaded can run code, and nothing is other than what was recorded."""

import ast
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.adapter_files import AdapterFolder, PrivateCopies, copy_adapter, digest_of
from serving.engine import VllmEngine, engine_args
from serving.errors import AdapterError, ConfigError
from serving.protocol import Adapter
from serving.server import catalogue_of, open_registry
from serving.settings import DEMO, Settings
from serving.weights import check_base_files, folder_sha256, pickled
from tests.setup_files import load

ROOT = Path(__file__).resolve().parent.parent
CODE = [
    path
    for folder in ("serving", "patches", "train", "bench", "setup")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
ADAPTER = DEMO / "adapters" / "llavac"


def calls(path, name):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
            yield node, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_remote_code_is_trusted_nowhere():
    told = [
        (path.name, keyword.lineno, ast.unparse(keyword.value))
        for path in CODE
        for keyword in ast.walk(ast.parse(path.read_text()))
        if isinstance(keyword, ast.keyword) and keyword.arg == "trust_remote_code"
    ]
    assert told
    assert [entry for entry in told if entry[2] != "False"] == []


@pytest.mark.parametrize("path", sorted((ROOT / "serving").rglob("*.py")), ids=lambda p: p.name)
def test_the_server_says_so_wherever_transformers_could_ask(path):
    """Without a word, transformers asks on the terminal, and a server has none."""
    for call, keywords in calls(path, "from_pretrained"):
        if ast.unparse(call.func).startswith("Auto"):
            assert keywords.get("trust_remote_code") == "False", f"line {call.lineno}"


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_unpickled(path):
    text = path.read_text()
    assert not re.search(r"\b(?:pickle|cloudpickle|joblib|dill)\.loads?\(", text)
    assert "allow_pickle=True" not in text
    for call, keywords in calls(path, "load"):
        if ast.unparse(call.func) == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {call.lineno}"


def test_the_engine_loads_safetensors_only_and_no_code():
    args = engine_args(Settings(), None)
    assert args.load_format == "safetensors"
    assert args.trust_remote_code is False
    assert args.enable_prompt_embeds is False
    assert args.enable_mm_embeds is False


NAMES = {
    "pytorch_model.bin": True,
    "pytorch_model-00001-of-00002.BIN": True,
    "adapter_model.bin": True,
    "mm_projector.bin": True,
    "consolidated.00.pth": True,
    "model.pt": True,
    "weights.ckpt": True,
    "weights.pkl": True,
    "model.safetensors": False,
    "tokenizer.model": False,
    "config.json": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "scheduler.pt": False,
    "rng_state_0.pth": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_pickled_weights_are_told_by_name(name):
    assert pickled([name]) == ([name] if NAMES[name] else [])


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(DEMO / "base", tmp_path / "base")


@pytest.fixture
def adapters(tmp_path):
    shutil.copytree(ADAPTER, tmp_path / "adapters" / "good")
    return tmp_path / "adapters"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
async def test_a_base_with_pickled_weights_is_refused_before_anything_loads(base, tmp_path, name):
    (base / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=f"{name}.*safetensors"):
        await VllmEngine.start(Settings(model=str(base)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_alone", [True, False])
async def test_an_adapter_with_pickled_weights_is_refused_with_the_reason_and_others_go_on(
    adapters, tmp_path, is_alone
):
    bad = shutil.copytree(ADAPTER, adapters / "bad")
    (bad / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    if is_alone:
        (bad / "adapter_model.safetensors").unlink()
    settings = Settings(adapters=str(adapters))
    registry = await open_registry(settings, catalogue_of(settings))
    reasons = {status.name: status.reason or "" for status in registry.statuses()}
    assert "pickle" in reasons["bad"]
    assert "safetensors" in reasons["bad"]
    assert set(registry.snapshot().served) == {"good"}
    assert not (tmp_path / "ran").exists()


def test_what_a_trainer_leaves_beside_an_adapter_is_neither_refused_nor_copied(adapters, tmp_path):
    (adapters / "good" / "training_args.bin").write_bytes(b"x")
    (adapters / "good" / "adapter_config.py").write_text("raise SystemExit")
    copy_adapter(str(adapters / "good"), tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "sieve.json",
    }


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "sieve.json"])
def test_one_changed_byte_anywhere_in_an_adapter_is_another_adapter(adapters, name):
    folder = adapters / "good"
    before = digest_of(folder)
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    assert digest_of(folder) != before


def test_an_adapter_that_changed_after_it_was_registered_is_not_loaded(adapters):
    (source,) = AdapterFolder(str(adapters)).list()
    folder = adapters / "good"
    known = Adapter(name="good", path=source.path, rank=8, digest=digest_of(folder))
    raw = bytearray((folder / "adapter_model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(raw)
    copies = PrivateCopies()
    try:
        with pytest.raises(AdapterError, match="changed after it was registered"):
            copies.take(known)
    finally:
        copies.close()


def test_a_shell_gives_the_same_hash_of_a_base(base):
    command = "LC_ALL=C sha256sum * | sha256sum"
    said = subprocess.run(command, shell=True, cwd=base, capture_output=True, check=True)
    assert said.stdout.decode().split()[0] == folder_sha256(base)


def test_a_pinned_base_is_accepted_as_long_as_every_byte_is_the_same(base):
    pin = folder_sha256(base)
    check_base_files(str(base), pin.upper())
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    with pytest.raises(ConfigError, match="not those that were pinned"):
        check_base_files(str(base), pin)


async def test_an_engine_does_not_start_on_another_base_than_the_pinned_one():
    with pytest.raises(ConfigError, match="not those that were pinned"):
        await VllmEngine.start(Settings(base_sha256="0" * 64))


def test_a_pin_needs_files_to_check_and_is_a_hash():
    with pytest.raises(ConfigError, match="local folder"):
        check_base_files("llava-hf/llava-1.5-7b-hf", "0" * 64)
    with pytest.raises(ValidationError):
        Settings(base_sha256="abc")


def test_the_lock_is_installed_with_its_hashes_and_without_source_builds(monkeypatch, tmp_path):
    """That every package of the lock has hashes is in test_setup.py."""
    install, commands = load("install"), []
    monkeypatch.setattr(install, "run", lambda command, failure: commands.append(command))
    monkeypatch.setattr(install, "pip_finds", lambda venv, requirement: False)
    install.install_cpu(tmp_path)
    (locked,) = [command for command in commands if install.LOCK in command]
    assert "--require-hashes" in locked
    assert "--only-binary=:all:" in locked
    assert "--no-deps" in locked
