"""Which engine gets a request: one where its adapter is warm, unless that one is busy.

An adapter that is asked for more than one engine can carry spreads to others as soon as those that
have it are half full; Ray's own multiplexing waits until they are quite full. Engines tell every
second which adapters they hold, and the router remembers where it sent one before they do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

STATS_PERIOD_S = 1.0
_REMEMBERED_S = 5.0


class AdapterRouter(FIFOMixin, RequestRouter):
    """Power of two choices among the warm engines, then among the others."""

    def initialize_state(self, spill_at: float = 0.5) -> None:
        """Sets how full, as a share, a warm engine is when requests go to others as well."""
        self._spill_at = spill_at
        self._sent: dict[tuple[str, ReplicaID], float] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of engines to ask; the less busy one of a rank takes the request."""
        key = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if not key:
            return [two_of(candidate_replicas)]
        warm = [replica for replica in candidate_replicas if self._is_warm(replica, key)]
        cold = [replica for replica in candidate_replicas if replica not in warm]
        first = two_of(warm)
        if not first or all(self._fill(replica) >= self._spill_at for replica in first):
            return [[*first[:1], *two_of(cold)[: 2 - len(first[:1])]] or first, first]
        return [first, two_of(cold)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Remembers where an adapter was sent: that engine is about to load it."""
        key, now = pending_request.metadata.multiplexed_model_id, time.monotonic()
        if key:
            self._sent[key, replica_id] = now
        if len(self._sent) > 1000:
            self._sent = {k: t for k, t in self._sent.items() if now - t < _REMEMBERED_S}

    def _is_warm(self, replica: RunningReplica, key: str) -> bool:
        if key in (replica.routing_stats or {}).get("adapters", ()):
            return True
        sent = self._sent.get((key, replica.replica_id))
        return sent is not None and time.monotonic() - sent < _REMEMBERED_S

    def _fill(self, replica: RunningReplica) -> float:
        """Share of an engine's places that are taken, as far as this router knows."""
        taken = self.replica_queue_len_cache.get(replica.replica_id)
        return (taken or 0) / replica.max_ongoing_requests


def two_of(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    """Two at random, or as many as there are."""
    return random.sample(replicas, min(2, len(replicas)))
