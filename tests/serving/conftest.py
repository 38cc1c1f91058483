"""Fixtures of the tests of keys."""

import pytest
from prometheus_client import CollectorRegistry

from serving.app import build_app
from serving.following import Bulletin
from serving.labeler import Labeler
from serving.manifest import Manifest
from serving.metrics import Metrics
from serving.registry import Registry
from serving.settings import Settings
from tests.serving.key_home import OWN, SlowEngine, entries, write
from tests.serving.test_labeler import catalogue


@pytest.fixture
def slow_engine():
    return SlowEngine()


@pytest.fixture
def keys_file(tmp_path):
    return write(tmp_path / "keys.yaml", entries())


@pytest.fixture
def make_guarded(slow_engine, published_tokenizer):
    def make(**settings):
        adapters = {
            "tuned": Manifest(label_structure="llavac"),
            "other": Manifest(label_structure=OWN),
        }
        labeler = Labeler(slow_engine, catalogue(adapters), published_tokenizer)
        return build_app(
            labeler,
            Settings(**settings),
            Metrics(CollectorRegistry()),
            bulletin=Bulletin(labeler.catalogue),
            adapters=Registry(None, check=None),
        )

    return make


@pytest.fixture
def guarded(make_guarded, keys_file):
    return make_guarded(keys=keys_file)
