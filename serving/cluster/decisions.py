"""What the autoscaler decided and why, kept where the server's metrics can read it."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: Name of the actor that runs `DecisionLog`, in Ray Serve's own namespace.
ACTOR_NAME = "sieve-autoscaling"

#: Every reason there is, so that each has a Prometheus series from the start.
REASONS = (
    "more_tokens",
    "queue_wait",
    "from_zero",
    "fewer_tokens",
    "to_zero",
    "bounds",
    "held_by_delay",
    "at_maximum",
    "stale_metrics",
)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A changed number of replicas, or a change that was held back.

    Attributes:
        time: seconds since the epoch.
        current: replicas asked for before.
        target: replicas asked for now; for `held_by_delay` those that the load would like, for
            `at_maximum` and `stale_metrics` as before.
        reason: one of `REASONS`.
        visual_tokens: kept visual tokens in the replicas when it was decided.
        queue_wait_s: the longest recent wait for an engine.
        queued: requests that no replica had accepted yet.
    """

    time: float
    current: int
    target: int
    reason: str
    visual_tokens: float
    queue_wait_s: float
    queued: float

    def as_dict(self) -> dict[str, Any]:
        """The decision in JSON's types."""
        return asdict(self)


class DecisionLog:
    """The last decisions, how many had each reason, and the load the policy saw last.

    Runs as a Ray actor: the policy, which lives in Serve's controller, writes without waiting, and
    the coordinator reads.

    Args:
        num_kept: most decisions kept; the counts go on.
    """

    def __init__(self, num_kept: int = 1000) -> None:
        self._decisions: deque[dict[str, Any]] = deque(maxlen=num_kept)
        self._counts = Counter(dict.fromkeys(REASONS, 0))
        self._load: dict[str, Any] = {}

    def record(self, decision: dict[str, Any]) -> None:
        """Keep one decision and count its reason."""
        self._decisions.append(decision)
        self._counts[decision["reason"]] += 1

    def observe(self, load: dict[str, Any]) -> None:
        """Keep the load as the policy sees it now; it reports about once a second."""
        self._load = load

    def read(self) -> list[dict[str, Any]]:
        """The kept decisions, oldest first."""
        return list(self._decisions)

    def counts(self) -> dict[str, int]:
        """Decisions by reason, reasons without one included."""
        return dict(self._counts)

    def load(self) -> dict[str, Any]:
        """The last reported load; empty until the policy ran."""
        return self._load


def send_to_log(method: Literal["record", "observe"], message: dict[str, Any]) -> None:
    """Send without waiting to the log's actor, if there is one.

    Never raises: an exception here would stop Serve's control loop.
    """
    try:
        import ray
        from ray.serve._private.constants import SERVE_NAMESPACE

        if ray.is_initialized():
            log = ray.get_actor(ACTOR_NAME, namespace=SERVE_NAMESPACE)
            getattr(log, method).remote(message)
    except ValueError:  # no such actor: nobody wants to know
        return
    except Exception:
        logging.getLogger("ray.serve").warning("Autoscaling log unreachable", exc_info=True)
