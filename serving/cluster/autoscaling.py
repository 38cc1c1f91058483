"""How many engine replicas there should be: a policy for Ray Serve's autoscaler.

Ray's controller asks ten times a second, then applies its own delays (`upscale_delay_s`,
`downscale_delay_s`, `downscale_to_zero_delay_s`) and bounds to the answer, so neither is repeated
here. The work of a request is its kept visual tokens and about 100 tokens of text and answer: at
576 patches a request at retention 0.2 is a third of one at 1.0.

More replicas: as many as the work in flight needs, or one more when requests wait too long all the
same. Fewer: as many as held the work with room to spare during the whole delay. A step down that
had to be taken back soon doubles the time until the next one.

Ray pickles this module by value into the controller: it imports little.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from serving.cluster.decisions import Decision, send_to_log

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TEXT_TOKENS = 100.0
#: Fewer replicas only when the work fills at most this share of them.
ROOM = 0.8
#: Replicas report the longest wait of so many seconds, so an old one may still be seen.
WAIT_WINDOW_S = 5.0
#: A replica's report is ignored after so long; Ray itself keeps it while the replica runs.
STALE_S = 10.0
MOST_REGRETS = 3
OBSERVE_EVERY_S = 1.0
_UP, _DOWN = ("more_tokens", "queue_wait"), ("fewer_tokens", "to_zero")
_HELD = ("held_by_delay", "at_maximum", "stale_metrics")
_MEMORY, _LAST = "sieve", "last_decision"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What there is to do, over all replicas, as the mean of the last seconds.

    Attributes:
        visual_tokens: kept visual tokens of accepted requests.
        requests: accepted requests without their answer.
        queued: requests at the ingress that no replica has accepted.
        ongoing: accepted and queued ones as the ingress counts them.
        queue_wait_s: the longest recent wait for an engine; 0 when no request came lately.
        queued_tokens: work of one queued request, which is only known by number: the mean of the
            accepted ones.
        is_known: whether each running replica reported lately.
    """

    visual_tokens: float = 0.0
    requests: float = 0.0
    queued: float = 0.0
    ongoing: float = 0.0
    queue_wait_s: float = 0.0
    queued_tokens: float = TEXT_TOKENS
    is_known: bool = True

    @property
    def tokens(self) -> float:
        """All work in tokens."""
        accepted = self.visual_tokens + TEXT_TOKENS * self.requests
        return accepted + self.queued * self.queued_tokens

    @property
    def has_requests(self) -> bool:
        """Whether there is anything to do."""
        return self.requests > 0 or self.queued > 0 or self.ongoing > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to do, and nothing was in the last seconds."""
        return not self.has_requests and self.queue_wait_s == 0


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Replicas that run, those asked for, and the bounds; settled when both agreed for a while."""

    running: int
    target: int
    least: int
    most: int
    are_settled: bool = True


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica should have to do: tokens in flight, and seconds until it is begun."""

    tokens_per_replica: float
    wait_s: float


@dataclass(frozen=True)
class Wish:
    """How many replicas the load asks for, and why."""

    replicas: int
    reason: str


def decide(load: Load, replicas: Replicas, limits: Limits) -> Wish:
    """The replicas that this load asks for, before any delay."""
    now = replicas.target
    within = min(max(now, replicas.least), replicas.most)
    if within != now:
        return Wish(within, "bounds")
    if replicas.running == 0 or now == 0:
        return _decide_without_any(load, replicas)
    needed = math.ceil(load.tokens / limits.tokens_per_replica)
    is_slow = load.queue_wait_s > limits.wait_s
    if needed > now or is_slow:
        if now == replicas.most:
            return Wish(now, "at_maximum")
        if needed > now:
            return Wish(min(needed, replicas.most), "more_tokens")
        return Wish(now + 1, "queue_wait") if replicas.are_settled else Wish(now, "steady")
    return _decide_fewer(load, replicas, limits)


def _decide_without_any(load: Load, replicas: Replicas) -> Wish:
    """No replica runs: one for any request. Those on their way are waited for, never recalled."""
    if replicas.target == 0 and load.has_requests:
        return Wish(min(1, replicas.most), "from_zero")
    return Wish(replicas.target, "steady")


def _decide_fewer(load: Load, replicas: Replicas, limits: Limits) -> Wish:
    now = replicas.target
    if now == 1 and replicas.least == 0 and load.is_idle:
        wish = Wish(0, "to_zero")
    else:
        fitting = math.ceil(load.tokens / (ROOM * limits.tokens_per_replica))
        wish = Wish(max(1, replicas.least, fitting), "fewer_tokens")
    if wish.replicas >= now or load.queue_wait_s > limits.wait_s / 2:
        return Wish(now, "steady")
    if load.is_known:
        return wish
    return Wish(now, "stale_metrics" if replicas.are_settled else "steady")


@dataclass(kw_only=True)
class Memory:
    """What the policy remembers from one call to the next, in JSON's types.

    Attributes:
        target: replicas asked for at the last call.
        running: replicas that ran at the last call.
        changed_at: when either last changed.
        reason: why the last call wished what it did.
        request_tokens: mean work of a request when there last was one.
        told: what was held back, and said so, since the target last changed.
        calm_since: since when fewer replicas would do.
        calm_most: the most of them that were needed since.
        down_at: when the target last went down.
        regrets: steps down in a row that were taken back.
        observed_at: when the load was last sent to the log.
    """

    target: int | None = None
    running: int = 0
    changed_at: float = 0.0
    reason: str = "steady"
    request_tokens: float = TEXT_TOKENS
    told: list[str] = field(default_factory=list)
    calm_since: float | None = None
    calm_most: int = 0
    down_at: float | None = None
    regrets: int = 0
    observed_at: float = 0.0

    def see(self, ctx: AutoscalingContext) -> tuple[float, int, Wish] | None:
        """Take in the replicas that there are.

        Returns:
            Time, former target and wish, if Ray changed the target since the last call.
        """
        now, running, target = ctx.current_time, ctx.current_num_replicas, ctx.target_num_replicas
        was, self.target = self.target, target
        if running != self.running or target != was:
            self.changed_at, self.running = now, running
        if was is None or was == target:
            return None
        self.calm_since, self.told = None, []
        if target < was:
            self.down_at = now
        elif was > 0:
            regret_s = 2 * ctx.config.downscale_delay_s + _report_lag_s(ctx)
            is_regret = self.down_at is not None and now - self.down_at <= regret_s
            self.regrets = min(self.regrets + 1, MOST_REGRETS) if is_regret else 0
        if was == 0:  # Ray does this without asking, and asks again once a replica runs
            return ctx.last_scale_up_time or now, was, Wish(target, "from_zero")
        is_ours = self.reason in (_UP if target > was else _DOWN)
        return now, was, Wish(target, self.reason if is_ours else "bounds")

    def calm(self, wish: Wish, ctx: AutoscalingContext) -> Wish:
        """A wish for fewer replicas becomes one for the most that were needed since it began.

        Ray waits for `downscale_delay_s` from when this first wishes for fewer; after regrets that
        is so much later that the whole wait doubles with each. The first `look_back_period_s` do
        not count: the mean load still holds the time before.
        """
        now, target = ctx.current_time, ctx.target_num_replicas
        if wish.replicas >= target or wish.reason == "bounds":
            self.calm_since = None
            return wish
        if self.calm_since is None:
            self.calm_since, self.calm_most = now, wish.replicas
        is_only_calm = now - self.calm_since > ctx.config.look_back_period_s
        self.calm_most = max(wish.replicas, self.calm_most if is_only_calm else 0)
        extra_s = ctx.config.downscale_delay_s * (2**self.regrets - 1)
        if self.calm_most > 0 and now - self.calm_since < extra_s:
            return Wish(target, "held_by_delay")
        return replace(wish, replicas=self.calm_most)

    def hold(self, wish: Wish, ctx: AutoscalingContext) -> Wish | None:
        """Remember the wish; what is held back, and why, once until the target changes."""
        self.reason, target = wish.reason, ctx.target_num_replicas
        is_regretted = wish.reason == "held_by_delay"
        wanted = self.calm_most if is_regretted else wish.replicas
        if wish.reason in _HELD:
            reason = wish.reason
        elif wanted != target and _delay_s(ctx, wish) > 0:
            reason = "held_by_delay"
        else:
            return None
        told = f"{reason} {'up' if wanted > target else 'down'}"
        if told in self.told:
            return None
        self.told.append(told)
        return Wish(wanted, reason)


class TokenPolicy:
    """Ray Serve's autoscaling policy by tokens in flight and queue wait.

    Args:
        visual_tokens_per_replica: work in flight that one replica should have: kept visual tokens
            and `TEXT_TOKENS` a request.
        target_wait_s: longest a request should wait for an engine.
    """

    def __init__(self, *, visual_tokens_per_replica: float, target_wait_s: float) -> None:
        assert visual_tokens_per_replica > 0
        assert target_wait_s > 0
        self._limits = Limits(tokens_per_replica=visual_tokens_per_replica, wait_s=target_wait_s)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas wished for, and what to remember."""
        memory = Memory(**ctx.policy_state.get(_MEMORY, {}))
        load = read_load(ctx, memory.request_tokens)
        if load.requests:
            memory.request_tokens = load.queued_tokens
        decisions = []
        change = memory.see(ctx)
        if change is not None:
            decisions.append(_as_decision(load, *change))
        replicas = _read_replicas(ctx, memory.changed_at)
        wish = memory.calm(decide(load, replicas, self._limits), ctx)
        held = memory.hold(wish, ctx)
        if held is not None:
            decisions.append(_as_decision(load, ctx.current_time, replicas.target, held))
        for decision in decisions:
            send_to_log("record", decision)
        if ctx.current_time - memory.observed_at >= OBSERVE_EVERY_S:
            memory.observed_at = ctx.current_time
            send_to_log("observe", {"time": ctx.current_time, **asdict(replicas), **asdict(load)})
        last = decisions[-1] if decisions else ctx.policy_state.get(_LAST)
        return wish.replicas, {_MEMORY: asdict(memory), _LAST: last}


def read_load(ctx: AutoscalingContext, request_tokens: float) -> Load:
    """The load from the replicas' last reports and the ingress's counts.

    Both cover `look_back_period_s`: one sample says little where a batch ends all at once. Raw
    series, because Ray's aggregate says nothing about their age; Ray leaves out replicas that no
    longer run.

    Args:
        ctx: Ray's context.
        request_tokens: work of a queued request where none is accepted now.
    """
    oldest = ctx.current_time - max(STALE_S, 3 * ctx.config.metrics_interval_s)

    def read(name: str) -> list[list[float]]:
        reports = (ctx.raw_metrics or {}).get(name, {}).values()
        fresh = [points for points in reports if points and points[-1].timestamp >= oldest]
        return [[point.value for point in points] for points in fresh]

    requests = [fmean(values) for values in read("requests")]
    visual_tokens = sum(fmean(values) for values in read("visual_tokens"))
    num_requests = sum(requests)
    if num_requests:
        request_tokens = TEXT_TOKENS + visual_tokens / num_requests
    return Load(
        visual_tokens=visual_tokens,
        requests=num_requests,
        queued=ctx.total_queued_requests or 0.0,
        ongoing=ctx.total_num_requests,
        queue_wait_s=max((values[-1] for values in read("queue_wait_s")), default=0.0),
        queued_tokens=request_tokens,
        is_known=len(requests) == ctx.current_num_replicas,
    )


def _read_replicas(ctx: AutoscalingContext, changed_at: float) -> Replicas:
    is_quiet = ctx.current_time - changed_at >= _report_lag_s(ctx)
    return Replicas(
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        least=ctx.capacity_adjusted_min_replicas,
        most=ctx.capacity_adjusted_max_replicas,
        are_settled=is_quiet and ctx.current_num_replicas == ctx.target_num_replicas,
    )


def _report_lag_s(ctx: AutoscalingContext) -> float:
    """How long an old queue wait may still be seen."""
    return WAIT_WINDOW_S + 2 * ctx.config.metrics_interval_s


def _delay_s(ctx: AutoscalingContext, wish: Wish) -> float:
    """How long Ray waits until it does what is wished."""
    if wish.replicas > ctx.target_num_replicas:
        return ctx.config.upscale_delay_s
    if wish.replicas == 0 and ctx.config.downscale_to_zero_delay_s is not None:
        return ctx.config.downscale_to_zero_delay_s
    return ctx.config.downscale_delay_s


def _as_decision(load: Load, time: float, current: int, wish: Wish) -> dict[str, Any]:
    return Decision(
        time=time,
        current=current,
        target=wish.replicas,
        reason=wish.reason,
        visual_tokens=load.visual_tokens,
        queue_wait_s=load.queue_wait_s,
        queued=load.queued,
    ).as_dict()
