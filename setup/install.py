"""Create the virtual environment: `make install`, or `make install GPU=1`.

Standard library only, since it runs before anything is installed. A second run compares one stamp
and returns. Pip's own settings on the machine (index, proxy, find-links) are used as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "setup" / "lock.txt"
HOOK = ROOT / "setup" / "torchvision_hook.py"
INPUTS = (LOCK, HOOK, ROOT / "setup" / "install.py", ROOT / "pyproject.toml")

PYTHONS = ((3, 11), (3, 12))
FREE_BYTES = {"cpu": 6 * 10**9, "gpu": 20 * 10**9}  # installed size plus pip's temporary files

# Not in the lock: a local version such as `+cpu` has its own hash wherever it is built.
TORCH = "2.13.0"
TORCHVISION = "0.28.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

HOOK_MODULE = "sieve_torchvision_hook"
PROBE = "from torchvision.transforms.v2.functional import resize"


class InstallError(Exception):
    """What the user can act on; shown without a traceback."""


class Step:
    """Announce a step and print how long it took."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> None:
        print(f"==> {self.title}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            print(f"    {time.monotonic() - self.start:.1f} s", flush=True)


def main() -> None:
    """Install what the flags ask for, unless the stamp says it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the CUDA stack")
    parser.add_argument("--venv", type=Path, help="default: .venv, or .venv-gpu with --gpu")
    args = parser.parse_args()
    venv = (args.venv or ROOT / (".venv-gpu" if args.gpu else ".venv")).absolute()
    kind = "gpu" if args.gpu else "cpu"

    check_python(sys.version_info[:2])
    stamp, content = venv / "sieve-stamp", fingerprint(venv, kind)
    if stamp.is_file() and stamp.read_text() == content:
        print(f"{venv.name} is up to date")
        return
    check_disk(venv.parent, FREE_BYTES[kind])
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    create(venv)
    (install_gpu if args.gpu else install_cpu)(venv)
    stamp.write_text(content)
    print(f"{venv.name} is ready ({time.monotonic() - start:.0f} s)")


def fingerprint(venv: Path, kind: str) -> str:
    """Hash everything that decides what gets installed, and where: a moved venv is a broken one."""
    digest = hashlib.sha256(f"{kind} {venv} {sys.version_info[:2]}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_python(version: tuple[int, int]) -> None:
    """Raise unless the wheels exist for this Python."""
    if version not in PYTHONS:
        allowed = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        found = ".".join(map(str, version))
        raise InstallError(
            f"Python {found} cannot run this project, which needs {allowed}. "
            "Name another one: make install PYTHON=python3.11"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raise unless `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InstallError(
            f"{folder} has {free / 1e9:.1f} GB free and the install needs {needed / 1e9:.0f} GB. "
            "Free some, or name another place: make install VENV=/elsewhere/venv"
        )


def create(venv: Path) -> None:
    """Create the environment; one that another Python version made is made anew."""
    config = venv / "pyvenv.cfg"
    ours = f"version = {sys.version_info[0]}.{sys.version_info[1]}."
    if config.is_file() and ours in config.read_text() and python(venv).exists():
        return
    with Step(f"{venv.name} with Python {sys.version.split()[0]}"):
        run([sys.executable, "-m", "venv", "--clear", venv], "the environment was not created")


def install_cpu(venv: Path) -> None:
    """Install torch, the lock and the project, then check the import that most often breaks."""
    with Step(f"torch {TORCH}+cpu: is it known to pip as configured?"):
        own = pip_finds(venv, f"torch=={TORCH}+cpu")
        print("    yes" if own else f"    no, so it is taken from {TORCH_CPU_INDEX}")
    with Step("torch and torchvision"):
        pip(venv, *torch_requirements(own))
    with Step("the lock (some 200 packages, about two minutes)"):
        pip(venv, "--require-hashes", "--only-binary=:all:", "-r", LOCK)
    with Step("LLaVA Sieve itself, editable"):
        pip(venv, "--no-build-isolation", "-e", ROOT)
    with Step(place_hook(venv, wanted=own)):
        run([python(venv), "-c", PROBE], "torchvision does not import")


def torch_requirements(own: bool) -> list[str]:
    """Return pip's arguments: no other index is asked where pip as configured has the CPU torch."""
    if own:
        return [f"torch=={TORCH}+cpu", f"torchvision=={TORCHVISION}"]
    return [
        f"--index-url={TORCH_CPU_INDEX}",
        f"torch=={TORCH}+cpu",
        f"torchvision=={TORCHVISION}+cpu",
    ]


def place_hook(venv: Path, wanted: bool) -> str:
    """Copy the import hook into the environment, or take an old one away; say which.

    PyTorch's index has a torchvision that matches its CPU torch; elsewhere it is built for CUDA and
    needs the hook.
    """
    packages = site_packages(venv)
    module, pth = packages / f"{HOOK_MODULE}.py", packages / f"{HOOK_MODULE}.pth"
    if not wanted:
        pth.unlink(missing_ok=True)
        module.unlink(missing_ok=True)
        return "torchvision is the CPU build, no import hook; checking that it imports"
    shutil.copyfile(HOOK, module)
    pth.write_text(f"import {HOOK_MODULE}; {HOOK_MODULE}.install()\n")
    return "torchvision is not the CPU build, import hook placed; checking that it imports"


def install_gpu(venv: Path) -> None:
    """Install the CUDA stack by pip's own resolver."""
    print("note: not run on our machines, which have no GPU; the lock covers the CPU stack only")
    with Step("LLaVA Sieve with its gpu and dev extras"):
        pip(venv, "-e", f"{ROOT}[gpu,dev]", deps=True)


def python(venv: Path) -> Path:
    """Return the environment's interpreter."""
    return venv / "bin" / "python"


def site_packages(venv: Path) -> Path:
    """Return the folder that packages are installed to."""
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def pip_finds(venv: Path, requirement: str) -> bool:
    """Tell whether pip as configured has `requirement`; raise where it fails for another reason."""
    # What an earlier run installed is no answer.
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--no-input"]
    command = [str(python(venv)), "-m", "pip", "install", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return True
    if "No matching distribution" in result.stderr:
        return False
    raise InstallError(f"pip could not look for {requirement}:\n{result.stderr.strip()}")


def pip(venv: Path, *arguments: str | Path, deps: bool = False) -> None:
    """Install; without dependencies unless told, since the lock names every package."""
    options = ["-qq", "--no-input", *([] if deps else ["--no-deps"])]
    run(
        [python(venv), "-m", "pip", "install", *options, *arguments],
        "pip failed, see above. Where it found no version or no connection, look at "
        "`python3 -m pip config list`: an index must be reachable",
    )


def run(command: Sequence[str | Path], failure: str) -> None:
    """Run a command whose output the user sees; raise `failure` unless it succeeds."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        raise InstallError(failure)


if __name__ == "__main__":
    try:
        main()
    except (InstallError, OSError) as error:
        sys.exit(f"install: {error}")
    except KeyboardInterrupt:
        sys.exit("install: stopped; run it again to go on")
