"""Choose the replica for a request: one that holds its weights already, unless it is full."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from expo_ray.extrapolation.step import DPO
from expo_ray.serving.served_models import NameFault, parse_name


class AlphaRouter(RequestRouter):
    """Prefers replicas that hold the step of a request. That only saves swaps: any replica swaps its weights if it has to.

    Its statistics (`ModelServer.record_routing_stats`) say how many requests its engine works on at once.

    A replica with adapters holds every step. Another is taken to hold the step that was last sent to it, or, before the first request, the one in its statistics.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Store `slots`, taken for replicas that have not said yet; called by Ray with the router's arguments."""
        self._slots: int = kwargs["slots"]
        self._sent: dict[ReplicaID, str] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        # Ray tries the ranks in this order and waits before it starts over, so that a full cluster is not asked in a busy loop.
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        step = _step_of(pending_request)
        ranks: list[list[RunningReplica]] = [[], [], [], []]
        for replica in candidate_replicas:
            ranks[self._rank(replica, step)].append(replica)
        return [rank for rank in ranks if rank]

    def _rank(self, replica: RunningReplica, step: str | None) -> int:
        """Rank of a replica for a request; 0 is the best.

        0. It holds the step and has room: no swap, no queue.
        1. It is idle: one swap. Better than a queue behind a full replica, so that a single step spreads over all replicas.
        2. It holds the step and is full: the request queues, without a swap.
        3. It works for another step: the request waits until that has drained, and then for a swap.
        """
        load = self.replica_queue_len_cache.get(replica.replica_id) or 0
        # The statistics are up to two seconds old, and a swap may be under way: what was sent last is what it will hold.
        held = self._sent.get(replica.replica_id, replica.routing_stats.get("step"))
        if step is None or held == step or replica.routing_stats.get("every_step"):
            return 0 if load < replica.routing_stats.get("slots", self._slots) else 2
        return 1 if load == 0 else 3

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        step = _step_of(pending_request)
        if step is not None:
            self._sent[replica_id] = step


def _step_of(request: PendingRequest | None) -> str | None:
    """The step whose weights a request needs; None where any replica will do."""
    model = getattr(request.args[0], "model", None) if request is not None and request.args else None
    try:
        return None if model is None else str(parse_name(model).step or DPO)
    except NameFault:
        return None
