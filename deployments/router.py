"""Serve's router of a model's requests: by what replicas hold, see `affinity`.

It lives in the process of whoever calls the model. A call says what it needs in the keyword `needs`.
"""

import time
from collections import Counter, OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.affinity import USUAL_BYTES, Holding, Load, Tier, rank

STATS_S = 1.0  # how often replicas say what they hold
MEMORY_S = 30.0  # how long we believe that a replica has what it was sent, without having heard so
MEMORIES = 1000  # for each replica


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped here
    """Sends a request where its weights are, and elsewhere when that is quicker."""

    def initialize_state(self, **_: Any) -> None:
        self._running: Counter[str] = Counter()
        self._sent: dict[str, OrderedDict[str, float]] = {}  # replica → need → when

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: of equal ranks Serve always takes the first."""
        if pending_request is None:
            return [[each] for each in candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if all are full; it would spin otherwise
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        loads = [self._load(each) for each in candidate_replicas]
        return [[by_name[name]] for name in rank(loads, pending_request.kwargs.get("needs", ()))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        name = replica_id.unique_id
        self._running[name] += 1
        sent = self._sent.setdefault(name, OrderedDict())
        for need in pending_request.kwargs.get("needs", ()):
            sent[need] = time.monotonic()
            sent.move_to_end(need)
        while len(sent) > MEMORIES:
            sent.popitem(last=False)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        if self._running[replica_id.unique_id]:  # it may have gone before its last answer
            self._running[replica_id.unique_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        here = {each.replica_id.unique_id for each in replicas}
        for name in self._sent.keys() - here:
            del self._sent[name], self._running[name]

    def _load(self, replica: RunningReplica) -> Load:
        name = replica.replica_id.unique_id
        told = replica.routing_stats or {}
        holds = {need: Holding(Tier(tier), nbytes) for need, (tier, nbytes) in told.get("holds", {}).items()}
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0  # others' requests included
        return Load(
            name,
            max(known, self._running[name]),
            told.get("seconds", 1.0),
            self._expected(name) | holds,
        )

    def _expected(self, name: str) -> dict[str, Holding]:
        """What the replica was sent a short while ago, and will soon say that it has."""
        since = time.monotonic() - MEMORY_S
        sent = self._sent.get(name) or OrderedDict()
        return {need: Holding(Tier.DEVICE, USUAL_BYTES) for need, at in sent.items() if at > since}

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: Any = None
    ) -> PendingRequest | None:
        """Serve's own matches by the id of the parent request, which calls made in one share: all but the
        last of those would wait for ever."""
        waiting = (each for each in self._pending_requests_to_fulfill if each.metadata is request_metadata)
        return next((each for each in waiting if not each.future.done()), None)
