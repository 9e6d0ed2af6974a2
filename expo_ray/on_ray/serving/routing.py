"""Which replica gets a request: one that holds its weights, as long as that one is not full."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from expo_ray.extrapolation.step import DPO
from expo_ray.serving.served_models import NameFault, parse_name


class AlphaRouter(RequestRouter):
    """Saves swaps, and nothing else: whichever replica is chosen swaps if it has to.

    What a replica holds is the step last sent to it, else the one that it tells of itself. An idle replica is better than a full
    one that holds the step, so that one step alone spreads over all replicas.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take `slots`, the number of requests that one engine works on at once."""
        self._slots: int = kwargs["slots"]
        self._sent: dict[ReplicaID, str] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        step = _step_of(pending_request)
        ranks: list[list[RunningReplica]] = [[], [], [], []]
        for replica in candidate_replicas:
            ranks[self._rank(replica, step)].append(replica)
        return [rank for rank in ranks if rank]

    def _rank(self, replica: RunningReplica, step: str | None) -> int:
        load = self.replica_queue_len_cache.get(replica.replica_id) or 0
        held = self._sent.get(replica.replica_id, replica.routing_stats.get("step"))
        if step is None or held == step:
            return 0 if load < self._slots else 2
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
