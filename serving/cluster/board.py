"""Everybody's metrics in one scrape: each series says which deployment and replica it is of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

_KEPT_S = 15.0


class Board:
    """The last metrics that each replica pushed; those of a replica that is gone disappear."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], tuple[float, str]] = {}

    def put(self, deployment: str, replica: str, text: bytes) -> None:
        """Keeps a replica's metrics in Prometheus's text format."""
        self._texts[deployment, replica] = time.monotonic(), text.decode("utf-8")

    def render(self) -> bytes:
        """All of them, a family once, with labels `deployment` and `replica`."""
        oldest = time.monotonic() - _KEPT_S
        self._texts = {key: kept for key, kept in self._texts.items() if kept[0] > oldest}
        merged = CollectorRegistry()
        merged.register(_Families(list(self._families())))
        return generate_latest(merged)

    def _families(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for (deployment, replica), (_, text) in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "deployment": deployment, "replica": replica}
                    whole.add_sample(sample.name, labels, sample.value)
        yield from families.values()


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
