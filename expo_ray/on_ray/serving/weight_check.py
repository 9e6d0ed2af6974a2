"""What an engine holds, compared with the plan's arithmetic at sampled elements of every kind of tensor."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from expo_ray.checkpoint.tensors import WEIGHT_DTYPES
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step, stepped
from expo_ray.on_ray.serving.engine_weights import Place, Traced, held_values, trace
from expo_ray.serving.weights import rows_of
from expo_ray.text import first_few, shown

log = logging.getLogger("expo_ray")

# Tensors of each kind that one comparison looks at, and of experts, most of what a mixture holds.
OF_A_KIND = 2
EXPERTS = 4
# Rows and columns of each tensor.
COUNT = 8
# Of a kind, until one is found that this worker holds a part of.
_TRIES = 16
_LEAST_SHARE = 0.9
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

Kind = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Sample:
    """Places of one tensor."""

    tensor: TensorPlan
    places: Sequence[Place]

    @property
    def rows(self) -> list[int]:
        return sorted({int(row) for place in self.places for row in place.origins[..., 0].flatten()})


class Comparison:
    """Compares again and again, at other elements and other tensors of each kind for each step.

    A kind are the tensors whose names differ in numbers only, of one shape: one in each layer, or one for each expert.

    Args:
        plan: whose parents are on this node.
        model: vLLM's.
        dtype: that the engine computes in.

    Attributes:
        tensors: those that can be compared; at each step some of every kind are.
        left_out: kinds that the engine uses and that cannot be compared, with the reason.
    """

    def __init__(self, plan: PairPlan, model: Any, dtype: torch.dtype) -> None:
        self._plan, self._model, self._dtype = plan, model, dtype
        self._kinds = _kinds_of(plan)
        self._traced = lru_cache(maxsize=1024)(self._trace)
        self.left_out: dict[str, str] = {}
        self._unused: set[Kind] = set()
        self._comparable = {kind for kind in self._kinds if self._can_be_compared(kind)}

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for kind in self._kinds if kind in self._comparable for tensor in self._kinds[kind]]

    @property
    def share(self) -> float:
        """Elements that can be compared, of those that the engine uses."""
        used = [tensor for kind in self._kinds if kind not in self._unused for tensor in self._kinds[kind]]
        return sum(map(_elements, self.tensors)) / max(1, sum(map(_elements, used)))

    def leave_out_rearranged(self, step: Step) -> None:
        """Learn from an engine that has loaded the weights of `step` from a folder which kinds it stores in another order or form."""
        others = set(self.differing(step))
        for kind, tensors in self._kinds.items():
            if kind in self._comparable and not others.isdisjoint(tensor.name for tensor in tensors):
                self._leave_out(kind, "the engine stores them in another order or form")

    def check_coverage(self) -> None:
        """See that a swap can be checked.

        Raises:
            RuntimeError: if a whole kind of tensors, or a tenth of all elements, cannot be compared.
        """
        if self.left_out or self.share < _LEAST_SHARE:
            reasons = [f"{name} ({reason})" for name, reason in self.left_out.items()]
            raise RuntimeError(
                f"{self._plan.name}: {1 - self.share:.0%} of the elements cannot be compared after a swap of weights: "
                f"{first_few(reasons)}; publish the model with `expo-ray extrapolate` and serve its folder under `models`"
                + (
                    ""
                    if not torch.cuda.is_available()
                    else ", or set `engine: {moe_backend: triton}` for experts"
                )
            )

    def differing(self, step: Step) -> list[str]:
        """The tensors that do not hold the weights of `step`."""
        samples = [
            sample for kind in self._kinds if kind in self._comparable for sample in self._samples(kind, step)
        ]
        picked = {sample.tensor.name: sample.rows for sample in samples}
        exact = rows_of(stepped(self._plan, step), picked, step.alpha)
        return [
            sample.tensor.name for sample in samples if not self._agree(sample, exact[sample.tensor.name])
        ]

    def _samples(self, kind: Kind, step: Step) -> list[_Sample]:
        chosen = random.Random(f"{kind} {step}")
        tensors = self._kinds[kind]
        count = EXPERTS if ".experts." in kind[0] else OF_A_KIND
        picked = chosen.sample(range(len(tensors)), min(count, len(tensors)))
        samples = []
        for index in picked:
            places = [place.sample(chosen, COUNT) for place in self._traced(tensors[index]).places]
            samples.append(_Sample(tensors[index], places))
        return [sample for sample in samples if sample.places]

    def _can_be_compared(self, kind: Kind) -> bool:
        tensors = self._kinds[kind]
        step = max(1, len(tensors) // _TRIES)
        used = False
        for tensor in tensors[::step]:
            try:
                traced = self._traced(tensor)
            except Exception as error:  # whatever an architecture's own loader raises
                return self._leave_out(kind, f"vLLM's loader does not take them alone: {shown(error)}")
            used |= traced.used
            if traced.places:
                if all(
                    held_values(self._model, place.sample(random.Random(0), 1), self._dtype)
                    for place in traced.places
                ):
                    return True
                return self._leave_out(kind, "the layer packs them")
        if not used:
            self._unused.add(kind)
        return used  # another worker holds them all

    def _leave_out(self, kind: Kind, reason: str) -> bool:
        self._comparable = {other for other in getattr(self, "_comparable", ()) if other != kind}
        self.left_out[shown(kind[0])] = reason
        return False

    def _trace(self, tensor: TensorPlan) -> Traced:
        return trace(self._model, tensor.name, tensor.shape)

    def _agree(self, sample: _Sample, exact: torch.Tensor) -> bool:
        places = {row: index for index, row in enumerate(sample.rows)}
        for place in sample.places:
            first, *others = place.origins.unbind(-1)
            first = first.clone().apply_(lambda row: places[int(row)])
            wanted = exact[(first, *others)]
            if not all(self._close(held, wanted) for held in held_values(self._model, place, self._dtype)):
                return False
        return True

    def _close(self, held: torch.Tensor, exact: torch.Tensor) -> bool:
        rounded = exact.to(self._dtype).float()
        # Products of float32 on a GPU may be TF32's.
        rtol = 2**-9 if self._dtype == torch.float32 and torch.cuda.is_available() else 0
        held = held.reshape(exact.shape)
        # Some layers keep float32 whatever the engine computes in.
        return bool((torch.isclose(held, rounded, rtol=rtol, atol=0) | (held == exact.float())).all())


def _kinds_of(plan: PairPlan) -> Mapping[Kind, Sequence[TensorPlan]]:
    kinds: dict[Kind, list[TensorPlan]] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.dtype in WEIGHT_DTYPES and tensor.shape and 0 not in tensor.shape:
                kinds.setdefault((_NUMBER.sub("N", tensor.name), tuple(tensor.shape)), []).append(tensor)
    return kinds


def _elements(tensor: TensorPlan) -> int:
    return math.prod(int(size) for size in tensor.shape)
