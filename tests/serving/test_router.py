"""Where requests go: to engines that have their adapter, unless those are busy."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")
from serving.cluster.router import AdapterRouter, two_of  # noqa: E402


@dataclass(frozen=True)
class Replica:
    """What the router reads of one."""

    replica_id: str
    routing_stats: dict = field(default_factory=dict, hash=False, compare=False)
    max_ongoing_requests: int = 8


class Router(AdapterRouter):
    """Without Ray's loops around it."""

    def __init__(self, taken=None, **settings):
        self._taken = taken or {}
        self.initialize_state(**settings)

    @property
    def replica_queue_len_cache(self):
        return SimpleNamespace(get=self._taken.get)


def request(key):
    return SimpleNamespace(
        metadata=SimpleNamespace(multiplexed_model_id=key),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def replicas(*adapters):
    return [Replica(name, {"adapters": list(keys)}) for name, keys in zip("abcd", adapters)]  # noqa: B905


def ranks(router, candidates, key):
    chosen = asyncio.run(router.choose_replicas(candidates, request(key)))
    return [[replica.replica_id for replica in rank] for rank in chosen]


def test_a_warm_engine_comes_first():
    for _ in range(20):
        first, second = ranks(Router(), replicas(["x"], [], ["y"]), "x")
        assert first == ["a"]
        assert set(second) == {"b", "c"}


def test_an_adapter_nobody_has_goes_anywhere():
    seen = Counter(ranks(Router(), replicas(["x"], [], []), "z")[0][0] for _ in range(200))
    assert seen.keys() == {"a", "b", "c"}


def test_a_busy_warm_engine_shares_with_a_cold_one():
    first, *_ = ranks(Router({"a": 4}), replicas(["x"], [], []), "x")
    assert first[0] == "a"
    assert first[1] in ("b", "c")
    first, *_ = ranks(Router({"a": 3}), replicas(["x"], [], []), "x")
    assert first == ["a"]


def test_the_base_model_goes_anywhere():
    seen = Counter(ranks(Router(), replicas(["x"], [], []), "")[0][0] for _ in range(200))
    assert seen.keys() == {"a", "b", "c"}


def test_what_was_just_sent_counts_as_warm():
    router = Router()
    router.on_request_routed(request("x"), "b", None)
    assert ranks(router, replicas([], [], []), "x")[0] == ["b"]


def test_two_of_few_are_all():
    assert two_of([]) == []
    assert two_of(["a"]) == ["a"]
    assert len(set(two_of("abc"))) == 2
