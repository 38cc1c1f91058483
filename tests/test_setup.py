"""The lock, the installer, the torchvision hook and the CI script."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.setup_files import load

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

LEFT_OUT = {"torchaudio", "torchcodec", "triton"}
BY_INSTALLER = {"torch", "torchvision"}


@pytest.fixture
def install():
    return load("install")


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return load("torchvision_hook")


# The lock


def locked():
    """Return {canonical name: (version, number of hashes)}."""
    text = (SETUP / "lock.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    packages = {}
    for line in lines:
        name, version = re.match(r"(\S+)==(\S+)", line).groups()
        packages[canonicalize_name(name)] = (version, line.count("--hash=sha256:"))
    return packages


LOCKED = locked()

in_the_locked_environment = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="the lock describes .venv, this is another"
)


def test_every_package_of_the_lock_has_a_hash():
    assert len(LOCKED) > 200
    assert [name for name, (_, hashes) in LOCKED.items() if not hashes] == []


def test_the_lock_has_no_cuda_package_and_nothing_that_was_left_out():
    unwanted = LEFT_OUT | BY_INSTALLER
    assert [n for n in LOCKED if n in unwanted or n.startswith(("nvidia-", "cuda-"))] == []


def declared():
    """Yield what pyproject asks of a CPU machine."""
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["cpu"], *extras["ray"], *extras["dev"]]:
        if not text.startswith(PROJECT["name"]):
            yield text


@pytest.mark.parametrize("text", declared())
def test_the_lock_satisfies_the_project(text):
    requirement = Requirement(text)
    version, _ = LOCKED[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


@in_the_locked_environment
def test_every_locked_package_finds_its_dependencies_in_the_lock():
    unmet = []
    for name in LOCKED:
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            wanted = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if wanted in LEFT_OUT | BY_INSTALLER:
                continue
            version, _ = LOCKED.get(wanted, (None, 0))
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                unmet.append(f"{name} wants {text}, locked is {version}")
    assert unmet == []


@in_the_locked_environment
def test_the_environment_is_the_lock():
    installed = {name: importlib.metadata.version(name) for name in LOCKED}
    assert installed == {name: version for name, (version, _) in LOCKED.items()}


def test_only_one_host_is_named():
    paths = [*SETUP.glob("*.*"), ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"]
    hosts = {h for path in paths for h in re.findall(r"\w+://([^/\s\"']+)", path.read_text())}
    assert hosts == {"download.pytorch.org"}


# The installer


def test_versions_named_twice_agree(install):
    assert f"torch=={install.TORCH}" in PROJECT["optional-dependencies"]["gpu"]
    cpu, gpu = (PROJECT["optional-dependencies"][extra][0] for extra in ("cpu", "gpu"))
    assert Requirement(cpu).specifier == Requirement(gpu).specifier


def test_a_second_run_starts_nothing(install, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path)])
    (tmp_path / "sieve-stamp").write_text(install.fingerprint(tmp_path, "cpu"))
    install.main()
    assert "up to date" in capsys.readouterr().out


def test_a_failed_run_leaves_no_stamp(install, monkeypatch, tmp_path):
    monkeypatch.setattr(
        install.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1)
    )
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path)])
    (tmp_path / "sieve-stamp").write_text("of an older lock")
    with pytest.raises(install.InstallError):
        install.main()
    assert not (tmp_path / "sieve-stamp").exists()


def test_the_stamp_follows_its_inputs(install, monkeypatch, tmp_path):
    changed = tmp_path / "lock.txt"
    changed.write_text(install.LOCK.read_text() + "one==1\n")
    before = install.fingerprint(tmp_path, "cpu")
    assert before != install.fingerprint(tmp_path / "moved", "cpu")
    assert before != install.fingerprint(tmp_path, "gpu")
    monkeypatch.setattr(install, "INPUTS", (changed, *install.INPUTS[1:]))
    assert before != install.fingerprint(tmp_path, "cpu")


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_a_wrong_python_is_told_what_is_allowed(install, version):
    with pytest.raises(install.InstallError, match=r"3\.11 or 3\.12.*PYTHON="):
        install.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_the_allowed_pythons_are_those_of_the_project(install, version):
    install.check_python(version)
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(
        "{}.{}".format(*version)
    )


def test_a_full_disk_is_told_before_anything_is_fetched(install, tmp_path):
    with pytest.raises(install.InstallError, match="GB free"):
        install.check_disk(tmp_path, 10**18)


@pytest.mark.parametrize(
    ("returncode", "stderr", "found"),
    [(0, "", True), (1, "ERROR: No matching distribution found for torch", False)],
)
def test_torch_is_looked_for_in_pip_as_configured(
    install, monkeypatch, tmp_path, returncode, stderr, found
):
    asked = []

    def answer(command, **_):
        asked.extend(command)
        return types.SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(install.subprocess, "run", answer)
    assert install.pip_finds(tmp_path, "torch==1") is found
    assert not any("index" in str(argument) for argument in asked)


def test_a_pip_that_fails_otherwise_is_no_reason_to_ask_another_index(
    install, monkeypatch, tmp_path
):
    broken = types.SimpleNamespace(returncode=2, stderr="no space left on device")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(install.InstallError, match="no space left"):
        install.pip_finds(tmp_path, "torch==1")


@pytest.mark.parametrize("own", [True, False])
def test_the_other_index_and_the_hook_exclude_each_other(install, tmp_path, own):
    install.site_packages(tmp_path).mkdir(parents=True)
    for _ in range(2):
        install.place_hook(tmp_path, wanted=True)
    install.place_hook(tmp_path, wanted=own)
    requirements = install.torch_requirements(own)
    assert any(install.TORCH_CPU_INDEX in text for text in requirements) is not own
    assert len(list(install.site_packages(tmp_path).iterdir())) == (2 if own else 0)


# The torchvision hook


def test_torchvision_resizes_in_this_environment():
    import torch
    from torchvision.transforms.v2.functional import resize

    assert resize(torch.zeros(1, 3, 8, 8), [4, 4]).shape == (1, 3, 4, 4)


def test_an_interpreter_starts_without_torch():
    code = "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_hook_is_installed_once(hook):
    hook.install()
    hook.install()
    assert sys.meta_path.count(hook.MissingOperators) == 1


@pytest.mark.parametrize(("native", "expected"), [(True, []), (False, ["nms", "qnms"])])
def test_the_hook_declares_operators_only_where_the_native_library_is_missing(
    hook, monkeypatch, native, expected
):
    import torch

    schemas = []
    extension = types.SimpleNamespace(_has_ops=lambda: native)
    library = types.SimpleNamespace(define=schemas.append)
    monkeypatch.setitem(sys.modules, "torchvision.extension", extension)
    monkeypatch.setattr(torch.library, "Library", lambda *_: library)
    hook.MissingOperators.find_spec("torchvision.ops")
    assert schemas == []
    assert hook.MissingOperators.find_spec(hook.HOOKED_MODULE) is None
    assert [schema.split("(")[0] for schema in schemas] == expected


# The commands


def test_help_is_the_default_and_names_every_target():
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text()).group(1).split()
    assert [target for target in targets if f"make {target} " not in text] == []


def test_ci_passes_the_status_on_and_ends_what_detached_itself(tmp_path):
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\nsetsid sleep 600 & echo $! >{tmp_path}/pid\nexit 3\n")
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        [ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid):
    """Tell whether a process has ended within two seconds (a zombie has)."""
    for _ in range(20):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False
