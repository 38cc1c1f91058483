"""Parts of the Ray home without Ray: settings, suspects, merged metrics, waits."""

import asyncio
import pickle
import time
from dataclasses import replace

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray")
from patches.config import Retention
from serving.cluster.board import Board
from serving.cluster.engine import opened
from serving.cluster.replica import Work
from serving.cluster.settings import RayAppSettings
from serving.errors import BadRequestError, EngineDeadError
from serving.protocol import Generation
from serving.settings import DEMO
from serving.suspects import Suspects, fingerprint
from tests.pictures import noise
from tests.serving.fake_engine import FakeEngine


def generation(text_ids=(1, 2), seed=0, **changes):
    request = Generation(
        request_id=f"r{time.perf_counter_ns()}",
        prompt_ids=list(text_ids),
        images=[noise(seed)],
        adapter=None,
        retention=Retention(),
        pattern="x",
        max_tokens=1,
        num_logprobs=1,
    )
    return replace(request, **changes)


def crash(num_together, engine=""):
    error = EngineDeadError("gone")
    error.is_crash, error.num_together, error.engine = True, num_together, engine
    return error


def test_the_same_question_has_the_same_fingerprint():
    assert fingerprint(generation()) == fingerprint(generation())
    assert fingerprint(generation()) != fingerprint(generation(seed=1))
    assert fingerprint(generation()) != fingerprint(generation(text_ids=(1, 3)))


def test_a_request_that_was_alone_in_a_failed_engine_is_refused_for_good():
    suspects = Suspects()
    suspects.check(generation())
    assert suspects.add(generation(), crash(1)).code == "quarantined"
    with pytest.raises(BadRequestError, match="not tried again"):
        suspects.check(generation())
    suspects.check(generation(seed=1))


def test_one_failure_strikes_the_same_question_once():
    suspects = Suspects()
    told = [suspects.add(generation(), crash(3, "first")).code for _ in range(3)]
    assert told == ["engine_crashed"] * 3
    assert suspects.add(generation(), crash(3, "second")).code == "quarantined"


def test_what_an_error_says_of_its_engine_survives_pickling():
    found = pickle.loads(pickle.dumps(crash(3, "first")))
    assert (found.is_crash, found.num_together, found.engine) == (True, 3, "first")


def test_one_among_others_may_come_again_once():
    suspects = Suspects()
    told = suspects.add(generation(), crash(3))
    assert (told.status, told.code, told.retry_after_s) == (503, "engine_crashed", 5)
    suspects.check(generation())
    assert suspects.add(generation(), crash(3)).code == "quarantined"
    with pytest.raises(BadRequestError):
        suspects.check(generation())


async def test_suspects_are_tried_one_at_a_time_and_an_answer_clears_them():
    suspects, inside, most = Suspects(), [], []
    for seed in range(3):
        suspects.add(generation(seed=seed), crash(3))

    async def ask(seed):
        async with suspects.turn(generation(seed=seed)):
            inside.append(seed)
            most.append(len(inside))
            await asyncio.sleep(0.01)
            inside.remove(seed)

    await asyncio.gather(*map(ask, range(3)))
    assert max(most) == 1
    await asyncio.gather(*map(ask, range(3)))
    assert max(most) == 3
    assert suspects.add(generation(seed=0), crash(3)).code == "engine_crashed"


async def test_others_do_not_wait_for_a_suspect():
    suspects = Suspects()
    suspects.add(generation(), crash(3))
    async with (
        asyncio.timeout(1),
        suspects.turn(generation()),
        suspects.turn(generation(seed=1)),
    ):
        pass


async def test_a_suspect_that_waited_is_refused_once_its_like_has_stopped_another_engine():
    suspects = Suspects()
    suspects.add(generation(), crash(3))
    crashed = asyncio.Event()

    async def ask():
        async with suspects.turn(generation()):
            await crashed.wait()
            raise suspects.add(generation(), crash(3))

    asking = [asyncio.create_task(ask()) for _ in range(2)]
    await asyncio.sleep(0)
    crashed.set()
    refusals = await asyncio.gather(*asking, return_exceptions=True)
    assert [refusal.code for refusal in refusals] == ["quarantined", "quarantined"]
    assert list(suspects._failures.values()) == [2]  # the second one reached no engine


class Replies:
    """A stream of a replica."""

    def __init__(self, *items):
        self._items = iter(items)

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self._items)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self):
        pass


@pytest.mark.parametrize("is_crash", [True, False])
async def test_a_stream_that_stops_its_engine_midway_is_a_suspect(is_crash):
    error = crash(1)
    error.is_crash = is_crash
    suspects = Suspects()
    events = await opened(
        Replies("", "data: a", error), lambda lost: suspects.add(generation(), lost)
    )
    found = [event async for event in events]
    assert found[-1] == "data: [DONE]\n\n"
    assert ("quarantined" in found[-2]) == is_crash
    assert bool(suspects._failures) == is_crash


def test_suspects_are_bounded():
    suspects = Suspects(most=3)
    for seed in range(10):
        suspects.add(generation(seed=seed), crash(1))
    assert len(suspects._failures) == 3


@pytest.mark.parametrize("replicas", ["0", "3-1", "x", "1-", "-2", ""])
def test_replicas_that_cannot_be_are_refused(replicas):
    with pytest.raises(ValueError, match="must be a number above 0 or a range"):
        RayAppSettings(replicas=replicas)


def test_replicas_are_a_number_or_a_range():
    assert (RayAppSettings(replicas="2").least_replicas, RayAppSettings().most_replicas) == (2, 1)
    ranged = RayAppSettings(replicas="0-3")
    assert (ranged.least_replicas, ranged.most_replicas) == (0, 3)


def test_all_engines_fit_on_a_ray_of_this_machine():
    assert RayAppSettings(replicas="1-500").own_ray_cpus == 500
    assert RayAppSettings(replicas="1-500", ray_cpus=4).own_ray_cpus == 4


def test_the_shipped_serve_config_has_settings_of_the_application():
    config = yaml.safe_load((DEMO.parent / "serve.yaml").read_text())
    (application,) = config["applications"]
    settings = RayAppSettings(**application["args"])
    assert (settings.least_replicas, settings.most_replicas) == (0, 3)


def test_the_application_builds_with_the_deployments_that_the_config_names():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call
    from ray.serve._private.build_app import build_app as resolve

    from serving.ray_app import NAME, app

    built = resolve(call(app, {"replicas": "1-3"}), name=NAME)  # as `serve run` and YAML do
    deployments = {item.name: item for item in built.deployments}
    assert deployments.keys() == {"Ingress", "Engine", "Coordinator"}
    assert built.ingress_deployment_name == "Ingress"
    engine = deployments["Engine"]._deployment_config
    assert (engine.autoscaling_config.min_replicas, engine.max_ongoing_requests) == (1, 64)
    config = yaml.safe_load((DEMO.parent / "serve.yaml").read_text())
    named = {item["name"] for item in config["applications"][0]["deployments"]}
    assert named <= deployments.keys()


def test_one_scrape_holds_everybodys_series():
    board = Board()
    for number, name in enumerate(("one", "two")):
        registry = CollectorRegistry()
        Counter("hits", "Hits", ["kind"], registry=registry).labels("a").inc(number + 1)
        Histogram("wait_seconds", "Wait", registry=registry).observe(0.1)
        board.put("Engine", name, generate_latest(registry))
    families = {f.name: f for f in text_string_to_metric_families(board.render().decode())}
    assert families["hits"].type == "counter"
    hits = {s.labels["replica"]: s.value for s in families["hits"].samples if "total" in s.name}
    assert hits == {"one": 1, "two": 2}
    counts = [s for s in families["wait_seconds"].samples if s.name == "wait_seconds_count"]
    assert [s.labels["deployment"] for s in counts] == ["Engine", "Engine"]
    assert board.render().decode().count("# TYPE wait_seconds histogram") == 1


def test_metrics_of_a_replica_that_is_gone_disappear(monkeypatch):
    board = Board()
    board.put("Engine", "old", b"# TYPE x gauge\nx 1.0\n")
    assert b'replica="old"' in board.render()
    monkeypatch.setattr("serving.cluster.board._KEPT_S", -1.0)
    assert b"old" not in board.render()


def test_work_counts_kept_tokens_until_the_answer():
    work, engine = Work(), FakeEngine()
    with work.of(Retention(ratio=0.25), 2, time.time() - 0.5, engine) as way_s:
        assert work.stats()["visual_tokens"] == 2 * 16
        assert work.stats()["requests"] == 1
        assert way_s == pytest.approx(0.5, abs=0.2)
    assert work.stats()["visual_tokens"] == work.stats()["requests"] == 0
    assert work.stats()["queue_wait_s"] > 0.4
