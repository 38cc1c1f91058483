"""The files of setup/, which is no package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

SETUP = Path(__file__).resolve().parent.parent / "setup"


def load(name: str) -> ModuleType:
    """Import setup/<name>.py anew."""
    spec = importlib.util.spec_from_file_location(name, SETUP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
