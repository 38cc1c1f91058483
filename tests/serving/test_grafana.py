"""serving/grafana.json shows metrics that exist, and all of ours."""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serving import metrics

SERVING = Path(metrics.__file__).parent
DASHBOARD = json.loads((SERVING / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = DASHBOARD["templating"]["list"]
METRIC = re.compile(r"\b(?:sieve_|vllm:)\w+")
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}


def expressions(panel):
    return [target["expr"] for target in panel["targets"]]


def names(text):
    return set(METRIC.findall(text))


SHOWN = names("\n".join(text for panel in PANELS for text in expressions(panel)))
SHOWN |= names("\n".join(v["definition"] for v in VARIABLES if v["type"] == "query"))


def ours():
    """{a metric: the names of its series}, of every class in serving/metrics.py."""
    kinds = [
        kind
        for _, kind in inspect.getmembers(metrics, inspect.isclass)
        if kind.__module__ == metrics.__name__ and "registry" in inspect.signature(kind).parameters
    ]
    registries = [CollectorRegistry() for _ in kinds]  # both homes count restarts, under one name
    for kind, registry in zip(kinds, registries, strict=True):
        kind(registry=registry)
    return {
        family.name: {family.name + suffix for suffix in SUFFIXES[family.type]}
        for registry in registries
        for family in registry.collect()
    }


OURS = ours()


def vllms():
    """Names of vLLM's series, as its source gives them (importing it takes 8 s)."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent / "v1"
    source = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    found = re.findall(r"_(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)
    return {name + suffix for kind, name in found for suffix in SUFFIXES[kind]}


@pytest.mark.parametrize("name", sorted(n for n in SHOWN if n.startswith("sieve_")))
def test_every_metric_of_ours_that_is_shown_exists(name):
    assert name in set().union(*OURS.values())


def test_every_metric_of_vllm_that_is_shown_exists():
    shown = {name for name in SHOWN if name.startswith("vllm:")}
    assert shown
    assert shown - vllms() == set()


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_metric_of_ours_is_shown(name):
    assert OURS[name] & SHOWN, f"no panel of serving/grafana.json shows {name}"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_asks_the_chosen_prometheus(panel):
    assert expressions(panel)
    for text in expressions(panel):
        assert names(text)
        assert text.count("(") == text.count(")")
        used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"}
        assert used <= {variable["name"] for variable in VARIABLES}
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_their_own_ids_and_places():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells
        cells |= own
