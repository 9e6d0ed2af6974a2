"""What an engine holds, compared with the plan's arithmetic at sampled elements."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expo_ray.checkpoint.tensors import WEIGHT_DTYPES
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, Step, stepped
from expo_ray.on_ray.engine_adapter import held_values
from expo_ray.on_ray.weights import rows_of

# Elements of this many tensors, spread over the model, are compared.
TENSORS = 24
ROWS = 8
COLUMNS = 8


@dataclass(frozen=True)
class _Places:
    """Elements of one tensor, and what the engine holds there; see `held_values`."""

    rows: Sequence[int]
    columns: Sequence[int]
    held: Sequence[torch.Tensor]


class Comparison:
    """Compares again and again, at other elements for each step.

    Args:
        plan: whose parents are on this node.
        model: vLLM's.
        dtype: that the engine computes in.

    Attributes:
        tensors: those that are compared.
    """

    def __init__(self, plan: PairPlan, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._plan, self._model, self._dtype = plan, model, dtype
        self.tensors = [tensor for tensor in _sampled(plan) if self._places(tensor, DPO).held]

    def leave_out_rearranged(self) -> None:
        """Learn from an engine that has loaded dpo itself which tensors its loader stores in another order or form."""
        others = set(self.differing(DPO))
        self.tensors = [tensor for tensor in self.tensors if tensor.name not in others]

    def differing(self, step: Step) -> list[str]:
        """The tensors that do not hold the weights of `step`."""
        places = {tensor.name: self._places(tensor, step) for tensor in self.tensors}
        picked = {name: place.rows for name, place in places.items()}
        exact = rows_of(stepped(self._plan, step), picked, step.alpha)
        return [name for name, place in places.items() if not self._agree(place, exact[name])]

    def _places(self, tensor: TensorPlan, step: Step) -> _Places:
        chosen = random.Random(f"{tensor.name} {step}")
        rows, columns = (
            sorted(chosen.sample(range(size), min(size, count)))
            for size, count in ((tensor.shape[0], ROWS), (tensor.shape[-1], COLUMNS))
        )
        return _Places(rows, columns, held_values(self._model, tensor.name, rows, columns, self._dtype))

    def _agree(self, places: _Places, exact: torch.Tensor) -> bool:
        exact = exact[:, places.columns] if exact.ndim == 2 else exact
        rounded = exact.to(self._dtype).float()
        # Products of float32 on a GPU may be TF32's.
        rtol = 2**-9 if self._dtype == torch.float32 and torch.cuda.is_available() else 0
        for held in places.held:
            here = ~held.isnan()
            close = torch.isclose(held[here], rounded[here], rtol=rtol, atol=0)
            # Some layers keep float32 whatever the engine computes in.
            if not (close | (held[here] == exact.float()[here])).all():
                return False
        return True


def _sampled(plan: PairPlan) -> Sequence[TensorPlan]:
    """The first, the last and some in between; embeddings, heads and final norms stand at the ends."""
    tensors = [
        tensor
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.dtype in WEIGHT_DTYPES and len(tensor.shape) in {1, 2}
    ]
    if len(tensors) <= TENSORS:
        return tensors
    return [tensors[index * (len(tensors) - 1) // (TENSORS - 1)] for index in range(TENSORS)]
