"""Replicas follow the visual tokens in flight and the queue: up fast, down calm, with reasons.

The policy runs inside Ray's own wrapper, which applies delays and factors, on a clock of ours.
"""

import json
import math
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

pytest.importorskip("ray.serve")

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.cluster import autoscaling, decisions
from serving.cluster.autoscaling import Limits, Load, Replicas, TokenPolicy, decide
from serving.cluster.decisions import REASONS, Decision, DecisionLog

ENGINE = DeploymentID(name="Engine", app_name="sieve")
KWARGS = {"visual_tokens_per_replica": 4000.0, "target_wait_s": 1.0}
LIMITS = Limits(tokens_per_replica=4000.0, wait_s=1.0)
TICK_S, START_S = 0.5, 3.0


def load_of(requests, kept=576, **more):
    return Load(visual_tokens=requests * kept, requests=requests, ongoing=requests, **more)


def replicas_of(running, target=None, least=1, most=3, **more):
    target = running if target is None else target
    return Replicas(running=running, target=target, least=least, most=most, **more)


def config_of(least=1, most=3, **more):
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 20, "downscale_to_zero_delay_s": 60}
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        metrics_interval_s=1,
        look_back_period_s=3,
        **(delays | more),
    )


def build_context(load, *, running, target, now, state, config, silent=0, scaled_up_at=None):
    """What Ray's controller hands to a policy; the last `silent` replicas have not reported."""
    ids = [ReplicaID(unique_id=str(index), deployment_id=ENGINE) for index in range(running)]
    figures = {
        "visual_tokens": load.visual_tokens / max(running, 1),
        "requests": load.requests / max(running, 1),
        "queue_wait_s": load.queue_wait_s,
    }
    reports = {
        name: {
            replica: [TimeStampedValue(now - 1, value), TimeStampedValue(now, value)]
            for replica in ids[: running - silent]
        }
        for name, value in figures.items()
    }
    return AutoscalingContext(
        deployment_id=ENGINE,
        deployment_name=ENGINE.name,
        app_name=ENGINE.app_name,
        current_num_replicas=running,
        target_num_replicas=target,
        running_replicas=ids,
        total_num_requests=lambda: load.ongoing + load.queued,
        total_queued_requests=lambda: load.queued,
        aggregated_metrics=None,
        raw_metrics=lambda: reports if running > silent else {},
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state=dict(state),
        last_scale_up_time=scaled_up_at,
        last_scale_down_time=None,
        current_time=now,
        config=config,
    )


class Cluster:
    """Ray's autoscaling loop around the policy, with replicas that take a while to start."""

    def __init__(self, config, replicas=1):
        self.config, self.now, self.state = config, 1000.0, {}
        self.target = self.running = replicas
        self.ready, self.scaled_up_at, self.changes = [], None, []
        self.policy = _apply_autoscaling_config(TokenPolicy(**KWARGS))

    def tick(self, load):
        self.now += TICK_S
        self.running = min(self.target, self.running + sum(at <= self.now for at in self.ready))
        self.ready = [at for at in self.ready if at > self.now]
        context = build_context(
            load,
            running=self.running,
            target=self.target,
            now=self.now,
            state=self.state,
            config=self.config,
            scaled_up_at=self.scaled_up_at,
        )
        clock = SimpleNamespace(time=lambda: self.now)
        with patch("ray.serve.autoscaling_policy.time", clock):
            wish, self.state = self.policy(context)
        json.dumps(self.state)
        target = max(self.config.min_replicas, min(self.config.max_replicas, wish))
        if target != self.target:
            self.changes.append(target)
        if target > self.target:
            self.scaled_up_at = self.now
            self.ready += [self.now + START_S] * (target - self.target)
        self.target = target

    def run(self, load, seconds):
        """Seconds at which the target changed, from the start of this run."""
        start, times = self.now, []
        for _ in range(round(seconds / TICK_S)):
            before = self.target
            self.tick(load(self) if callable(load) else load)
            if self.target != before:
                times.append(self.now - start)
        return times


@contextmanager
def logged():
    log = DecisionLog()
    with patch.object(autoscaling, "send_to_log", lambda name, said: getattr(log, name)(said)):
        yield log


@pytest.fixture
def log():
    with logged() as log:
        yield log


def reasons(log):
    return [entry["reason"] for entry in log.read()]


def test_a_request_at_retention_02_is_a_third_of_one_at_10():
    assert 0.28 < load_of(1, kept=115).tokens / load_of(1, kept=576).tokens < 0.36


@pytest.mark.parametrize(("kept", "wanted"), [(576, 3), (115, 1)])
def test_as_many_requests_need_replicas_by_their_tokens(kept, wanted):
    assert decide(load_of(15, kept), replicas_of(1), LIMITS).replicas == wanted


def test_queued_requests_count_as_much_as_the_accepted_ones():
    queued = {
        kept: Cluster(config_of(upscale_delay_s=0)).run(
            load_of(4, kept, queued=8), seconds=2 * TICK_S
        )
        for kept in (576, 115)
    }
    assert queued[576]
    assert not queued[115]


def test_up_at_token_load_within_the_upscale_delay(log):
    cluster = Cluster(config_of())
    assert cluster.run(load_of(15), seconds=10) == [1.0 + TICK_S]
    assert cluster.target == 3
    assert reasons(log) == ["held_by_delay", "more_tokens"]


def test_a_load_above_the_maximum_says_so_once_however_it_flickers(log):
    cluster = Cluster(config_of(upscale_delay_s=0))
    cluster.run(lambda cluster: load_of(20 if cluster.now % 2 else 15), seconds=30)
    assert reasons(log) == ["more_tokens", "at_maximum"]


def test_a_sample_between_two_batches_does_not_hide_the_load():
    context = build_context(
        load_of(8), running=1, target=1, now=1000.0, state={}, config=config_of()
    )
    for reports in context.raw_metrics.values():
        for points in reports.values():
            points[-1] = TimeStampedValue(1000.0, 0.0)
    assert autoscaling.read_load(context, request_tokens=0).tokens == load_of(4).tokens


def test_up_by_one_when_requests_wait_too_long_although_tokens_fit(log):
    cluster = Cluster(config_of(upscale_delay_s=0))
    times = cluster.run(load_of(1, queue_wait_s=2.5), seconds=15)
    assert cluster.changes == [2]
    assert times[0] >= autoscaling.WAIT_WINDOW_S
    assert "queue_wait" in reasons(log)


def test_an_old_wait_does_not_ask_for_a_second_replica_more():
    cluster = Cluster(config_of(upscale_delay_s=0))

    def served_soon_by_two(cluster):
        return load_of(1, queue_wait_s=2.5 if cluster.running < 2 else 0.6)

    cluster.run(served_soon_by_two, seconds=200)
    assert cluster.changes == [2]


def test_down_only_after_the_whole_delay_and_to_the_most_that_was_needed(log):
    cluster = Cluster(config_of(), replicas=3)

    def two_then_one(cluster):
        return load_of(7) if cluster.now < 1010 else load_of(1)

    times = cluster.run(two_then_one, seconds=60)
    assert cluster.changes == [2, 1]
    assert times[0] >= 20
    assert times[1] - times[0] >= 20
    assert reasons(log) == ["held_by_delay", "fewer_tokens"] * 2


def test_a_load_that_ends_goes_down_in_one_step_although_its_mean_falls_slowly():
    cluster = Cluster(config_of(), replicas=3)
    cluster.run(load_of(15), seconds=10)
    cluster.run(load_of(7), seconds=2)
    cluster.run(load_of(0), seconds=25)
    assert cluster.changes == [1]


def test_a_load_that_just_fits_keeps_the_replicas():
    """Hysteresis: up at more than one replica's work, down only at 0.8 of it."""
    requests = 0.95 * 4000 / 676
    assert decide(load_of(requests), replicas_of(1), LIMITS).replicas == 1
    assert decide(load_of(requests), replicas_of(2), LIMITS).replicas == 2
    assert decide(load_of(0.8 * requests), replicas_of(2), LIMITS).replicas == 1


def test_replicas_stay_while_requests_wait_long():
    assert decide(load_of(1, queue_wait_s=0.6), replicas_of(2), LIMITS).replicas == 2


def test_a_step_down_that_was_taken_back_doubles_the_next_wait(log):
    """One replica is too slow and two look idle: in flight is little once nothing queues."""
    cluster = Cluster(config_of(upscale_delay_s=0))

    def too_much_for_one(cluster):
        return load_of(8 if cluster.running < 2 else 1)

    times = cluster.run(too_much_for_one, seconds=900)
    kept = [down - up for up, down in zip(times[::2], times[1::2], strict=False)]
    assert kept == sorted(kept)
    assert kept[0] < 30
    assert kept[-1] > 7 * 20


@pytest.mark.parametrize("silent", [1, 2])
def test_replicas_stay_while_one_of_them_does_not_report(silent):
    state, held = {}, []
    for second in range(60):
        context = build_context(
            load_of(0),
            running=2,
            target=2,
            now=1000.0 + second,
            state=state,
            config=config_of(),
            silent=silent,
        )
        wish, state = TokenPolicy(**KWARGS)(context)
        held.append(wish)
    assert set(held) == {2}
    assert state["last_decision"]["reason"] == "stale_metrics"


def test_a_dead_replicas_old_report_is_no_load():
    context = build_context(
        load_of(20), running=1, target=1, now=1000.0, state={}, config=config_of()
    )
    for reports in context.raw_metrics.values():
        for replica, points in reports.items():
            old = [TimeStampedValue(point.timestamp - 60, point.value) for point in points]
            reports[replica] = old
    load = autoscaling.read_load(context, request_tokens=676)
    assert (load.visual_tokens, load.requests, load.is_known) == (0, 0, False)


def test_to_zero_only_after_its_own_delay_without_any_request(log):
    cluster = Cluster(config_of(least=0))
    assert not cluster.run(load_of(1), seconds=100)
    assert not cluster.run(load_of(0), seconds=50)
    assert not cluster.run(load_of(0, queue_wait_s=0.01), seconds=TICK_S)
    times = cluster.run(load_of(0), seconds=80)
    assert cluster.changes == [0]
    assert 60 <= times[0] <= 62
    assert reasons(log) == ["held_by_delay", "to_zero"]


def test_never_to_zero_where_the_minimum_is_one():
    cluster = Cluster(config_of(least=1))
    assert not cluster.run(load_of(0), seconds=200)


def test_from_zero_at_the_first_queued_request(log):
    cluster = Cluster(config_of(least=0), replicas=0)
    cluster.run(load_of(0), seconds=5)
    assert cluster.run(Load(queued=1, ongoing=1), seconds=10) == [TICK_S]
    assert cluster.target == 1
    assert reasons(log) == ["from_zero"]
    assert log.read()[0]["time"] == cluster.scaled_up_at


def test_the_policy_itself_asks_for_one_from_zero():
    assert decide(Load(queued=1), replicas_of(0, least=0), LIMITS).replicas == 1
    assert decide(Load(), replicas_of(0, least=0), LIMITS).replicas == 0


def test_replicas_on_their_way_are_not_recalled():
    """With none running Ray skips its delays, so a smaller wish would take effect at once."""
    assert decide(Load(), replicas_of(0, target=3, least=0), LIMITS).replicas == 3


def test_changed_bounds_are_followed_and_named(log):
    cluster = Cluster(config_of(upscale_delay_s=0), replicas=1)
    cluster.run(load_of(1), seconds=5)
    cluster.config = config_of(least=2, most=3, upscale_delay_s=0)
    cluster.run(load_of(1), seconds=5)
    assert cluster.target == 2
    assert reasons(log) == ["bounds"]


loads = st.builds(
    lambda requests, kept, queued, wait: load_of(requests, kept, queued=queued, queue_wait_s=wait),
    requests=st.integers(0, 60),
    kept=st.integers(1, 576),
    queued=st.integers(0, 60),
    wait=st.floats(0, 5),
)
bounds = st.tuples(st.integers(0, 3), st.integers(1, 5)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(load=loads, bounds=bounds)
def test_the_target_settles_under_a_constant_load(load, bounds):
    least, most = bounds
    cluster = Cluster(config_of(least=least, most=max(1, most)), replicas=max(1, least))
    cluster.run(load, seconds=240)
    assert not cluster.run(load, seconds=240)


@settings(max_examples=60, deadline=None)
@given(
    load=loads,
    bounds=bounds,
    running=st.integers(0, 6),
    target=st.integers(0, 6),
    are_settled=st.booleans(),
    is_known=st.booleans(),
)
def test_the_wish_is_always_within_bounds(load, bounds, running, target, are_settled, is_known):
    least, most = bounds
    replicas = replicas_of(running, target, least, most, are_settled=are_settled)
    wish = decide(Load(**(vars(load) | {"is_known": is_known})), replicas, LIMITS)
    assert least <= wish.replicas <= most
    assert wish.reason in {*REASONS, "steady"}
    assert math.isclose(wish.replicas, target) == (
        wish.reason in {"steady", "at_maximum", "stale_metrics"}
    )


@settings(max_examples=30, deadline=None)
@given(base=st.integers(1, 12), noise=st.lists(st.integers(-3, 3), min_size=40, max_size=40))
def test_a_noisy_load_does_not_make_it_flap(base, noise):
    """Within five minutes at most one step up a replica, and down only after a calm delay."""
    cluster = Cluster(config_of())
    times = cluster.run(
        lambda cluster: load_of(max(0, base + noise[round(cluster.now * 2) % 40])), seconds=300
    )
    assert len(times) <= 2  # the noise comes round every 20 s, which is the delay down


def test_each_decision_has_all_its_figures_and_each_reason_a_counter(log):
    cluster = Cluster(config_of())
    cluster.run(load_of(15, queue_wait_s=2.5), seconds=5)
    cluster.run(load_of(0), seconds=100)
    decisions = [Decision(**entry) for entry in log.read()]
    assert {decision.reason for decision in decisions} <= set(REASONS)
    first = decisions[1]
    assert (first.current, first.target, first.visual_tokens) == (1, 3, 15 * 576)
    assert set(log.counts()) == set(REASONS)
    assert sum(log.counts().values()) == len(decisions)
    assert log.counts()["fewer_tokens"] == 1
    assert cluster.state["last_decision"] == log.read()[-1]
    assert log.load()["target"] == 1


def test_the_log_forgets_old_decisions_but_counts_them():
    log = DecisionLog(num_kept=2)
    for time in range(5):
        log.record({"time": time, "reason": "queue_wait"})
    assert [entry["time"] for entry in log.read()] == [3, 4]
    assert log.counts()["queue_wait"] == 5


def test_without_ray_nothing_is_sent_and_nothing_fails():
    with patch("ray.get_actor") as get_actor:
        decisions.send_to_log("record", {"reason": "queue_wait"})
    get_actor.assert_not_called()


@pytest.mark.parametrize("error", [ValueError("no actor"), RuntimeError("the GCS is away")])
def test_an_unreachable_log_does_not_stop_the_controller(error):
    with (
        patch("ray.is_initialized", return_value=True),
        patch("ray.get_actor", side_effect=error),
    ):
        decisions.send_to_log("record", {"reason": "queue_wait"})


LOADS_IN_A_PROCESS = """
import pickle, sys
from ray.serve.config import AutoscalingPolicy
kwargs, blob = pickle.load(sys.stdin.buffer)
policy = AutoscalingPolicy.from_serialized_policy_def(kwargs, blob).get_policy()
assert not {"vllm", "torch"} & set(sys.modules), "heavy imports"
from tests.serving.test_autoscaling import build_context, config_of, load_of
context = build_context(
    load_of(15), running=1, target=1, now=1000.0, state={}, config=config_of()
)
print(policy(**kwargs["policy_kwargs"])(context)[0])
"""


def test_ray_takes_the_class_by_name_and_unpickles_it_in_another_process():
    name = "serving.cluster.autoscaling:TokenPolicy"
    config = config_of(policy=AutoscalingPolicy(policy_function=name, policy_kwargs=KWARGS))
    sent = {"policy_function": name, "policy_kwargs": config.policy.policy_kwargs}
    done = subprocess.run(
        [sys.executable, "-c", LOADS_IN_A_PROCESS],
        input=pickle.dumps((sent, config.policy.get_serialized_policy_def())),
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.decode().split()[-1:] == ["3"], done.stderr.decode()
