"""Checkpoints and engines that tests share; each is made once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from serving.settings import DEMO
from tests.checkpoints import build_adapter, build_published_like
from tests.running import RunningServer

STRUCTURES_YAML = """\
quality:
  fields:
    verdict: [very good, very bad, very, good, bad]
    tone: [good, bad, bad day]
  prompt: "Text: {text}\\nWhat is this post?"
  answer: "{verdict}: {tone}"
"""


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A random checkpoint with the published processor, positions, tokenizer and names."""
    return build_published_like(tmp_path_factory.mktemp("published") / "base")


@pytest.fixture(scope="session")
def published_adapters(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    build_adapter(published, folder / "first", seed=1)
    build_adapter(published, folder / "second", seed=2, rank=16)
    return folder


@pytest.fixture(scope="session")
def structures_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("structures") / "structures.yaml"
    path.write_text(STRUCTURES_YAML)
    return path


def load_chat_tokenizer(folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.chat_template = processor.tokenizer.chat_template or processor.chat_template
    return processor.tokenizer


@pytest.fixture(scope="session")
def published_tokenizer(published):
    return load_chat_tokenizer(published)


@pytest.fixture(scope="session")
def demo_tokenizer():
    return load_chat_tokenizer(DEMO / "base")


@pytest.fixture(scope="session")
def demo_server():
    """The shipped demo in float32, behind real HTTP."""
    with RunningServer(dtype="float32") as server:
        yield server


@pytest.fixture(scope="session")
def published_server(published, published_adapters, structures_file):
    """A published-shape checkpoint in float32 with two adapters and a structure of its own."""
    with RunningServer(
        model=str(published),
        adapters=published_adapters,
        structures=structures_file,
        dtype="float32",
        retention=0.4,
        max_model_len=2600,
        model_name="published",
    ) as server:
        yield server


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory):
    """The shipped demo in float32 on Ray, with adapters in a folder that may change."""
    from tests.ray_running import RayServer

    folder = tmp_path_factory.mktemp("ray")
    adapters = shutil.copytree(DEMO / "adapters", folder / "adapters")
    settings = {"dtype": "float32", "log_format": "json", "log_level": "info"}
    with RayServer(folder / "log", adapters=str(adapters), **settings) as server:
        yield server


@pytest.fixture(scope="session")
def bfloat16_server():
    """The shipped demo as it is served by default."""
    with RunningServer(dtype="bfloat16") as server:
        yield server
