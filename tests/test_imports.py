"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"serving", "patches", "train", "bench"}
ALLOWED = {
    "patches": {"patches"},
    "serving": {"serving", "patches.selection", "patches.config", "patches.canonical"},
    "train": {
        "train",
        "serving.posts",
        "serving.schema",
        "serving.structures",
        "serving.prompts",
        "serving.manifest",
        "serving.probes",
        "serving.errors",
        "serving.images",
        "serving.constraint",
        "serving.scoring",
        "serving.retries",
        "serving.client_key",
        "patches.selection",
        "patches.config",
    },
    "bench": {"bench", "serving", "patches"},
}
FILES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_allowed(name, allowed):
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_the_design_allows(path):
    package = path.relative_to(ROOT).parts[0]
    ours = [name for name in imported(path) if name.split(".")[0] in OURS]
    modules = {name for name in ours if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
    assert not [name for name in modules if not is_allowed(name, ALLOWED[package])]


def test_only_the_engine_imports_vllm_in_serving():
    users = {
        path.name
        for path in (ROOT / "serving").glob("*.py")
        if any(name.split(".")[0] == "vllm" for name in imported(path))
    }
    assert users == {"engine.py"}
