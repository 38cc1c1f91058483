"""The README's training commands, as pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_readmes_training_commands_work_as_pasted(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "train fit" in block]
    commands = block.replace("/tmp/", f"{tmp_path}/").replace(".venv/bin/python", sys.executable)
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = load_manifest(tmp_path / "adapters" / "mine")
    assert manifest is not None
    assert manifest.recipe == "demo"
    assert len(manifest.retention_curve) == 4
