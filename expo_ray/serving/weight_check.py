"""Compare what an engine holds with the plan's arithmetic, at sampled elements of every kind of tensor."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expo_ray.checkpoint.tensors import WEIGHT_DTYPES
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step, stepped
from expo_ray.serving.weights import rows_of
from expo_ray.text import first_few, shown

log = logging.getLogger("expo_ray")

# Tensors of each kind that one comparison looks at, and of experts, most of what a mixture holds.
OF_A_KIND = 2
EXPERTS = 4
# Rows and columns of each tensor.
SAMPLE_SIZE = 8
# Of a kind, until one is found that this worker holds a part of.
_TRIES = 16
_LEAST_SHARE = 0.9
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

Kind = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Elements of one parameter of the engine that come from one tensor of the checkpoint.

    Attributes:
        module: the layer that holds the parameter.
        shape: of the parameter as the loader fills it, before any packing.
        rows: indices of all its dimensions but the last.
        columns: indices of the last.
        origins: (rows, columns, dimensions of the tensor) indices of these elements in the checkpoint.
    """

    module: Any
    parameter: str
    shape: tuple[int, ...]
    rows: Sequence[tuple[int, ...]]
    columns: Sequence[int]
    origins: torch.Tensor

    def sample(self, generator: random.Random, count: int) -> Place:
        """At most `count` rows and columns of it."""
        rows, columns = (
            sorted(generator.sample(range(size), min(size, count)))
            for size in (len(self.rows), len(self.columns))
        )
        sampled = [self.rows[index] for index in rows], [self.columns[index] for index in columns]
        return Place(self.module, self.parameter, self.shape, *sampled, self.origins[rows][:, columns])


@dataclass(frozen=True)
class TracedTensor:
    """The places of a tensor of the checkpoint in an engine.

    Attributes:
        used: whether the engine loads it at all; it leaves out copies that are tied, for example.
        places: on this worker; empty if other workers hold all of it.
    """

    used: bool
    places: Sequence[Place]


class EngineWeights(Protocol):
    """The weights of a running engine, of one of its workers.

    Attributes:
        dtype: that the engine computes in.
    """

    dtype: torch.dtype

    def trace(self, name: str, shape: Sequence[int], generator: random.Random) -> TracedTensor:
        """Find where the engine holds one tensor of the checkpoint, at places drawn anew each time if it can be.

        Raises:
            Exception: any, if the loader does not take this tensor alone.
        """

    def held_values(self, place: Place) -> list[torch.Tensor]:
        """Read the values that the engine computes with at a place, (rows, columns) in float32, one for each use.

        Empty where the layer keeps its weights in an unknown form.
        """


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

    A kind is all tensors of one shape whose names differ in numbers only: one in each layer, or one for each expert.

    Args:
        plan: whose parents are on this node.

    Attributes:
        tensors: those that can be compared; at each step some of every kind are.
        left_out: kinds that the engine uses and that cannot be compared, with the reason.
    """

    def __init__(self, plan: PairPlan, weights: EngineWeights) -> None:
        self._plan, self._weights = plan, weights
        self._kinds = _kinds_of(plan)
        self.left_out: dict[str, str] = {}
        self._unused: set[Kind] = set()
        self._comparable = set(self._kinds)
        for kind in self._kinds:
            if not self._can_be_compared(kind):
                self._comparable.discard(kind)

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for kind in self._kinds if kind in self._comparable for tensor in self._kinds[kind]]

    @property
    def share(self) -> float:
        """Share of the elements used by the engine that can be compared."""
        used = [tensor for kind in self._kinds if kind not in self._unused for tensor in self._kinds[kind]]
        return sum(map(_elements, self.tensors)) / max(1, sum(map(_elements, used)))

    def leave_out_rearranged(self, step: Step) -> None:
        """Stop comparing tensors that this engine's loader reorders or transforms.

        Call it while the engine holds the weights of `step`, loaded from a folder: whatever differs then, differs by its form.
        """
        differing = set(self.find_differing(step))
        for kind, tensors in self._kinds.items():
            if kind in self._comparable and not differing.isdisjoint(tensor.name for tensor in tensors):
                self._leave_out(kind, "the engine stores them in another order or form")

    def check_coverage(self) -> None:
        """Check that enough can be compared to verify a swap.

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

    def find_differing(self, step: Step) -> list[str]:
        """Compare samples of every kind with the weights of `step`, computed anew; returns the names of tensors that differ."""
        samples = [
            sample for kind in self._kinds if kind in self._comparable for sample in self._samples(kind, step)
        ]
        rows = {sample.tensor.name: sample.rows for sample in samples}
        exact = rows_of(stepped(self._plan, step), rows, step.alpha)
        return [
            sample.tensor.name for sample in samples if not self._agree(sample, exact[sample.tensor.name])
        ]

    def _samples(self, kind: Kind, step: Step) -> list[_Sample]:
        # Seeded by the step: all workers of an engine sample alike, and each step looks at other elements.
        generator = random.Random(f"{kind} {step}")
        tensors = self._kinds[kind]
        count = EXPERTS if ".experts." in kind[0] else OF_A_KIND
        sampled = generator.sample(range(len(tensors)), min(count, len(tensors)))
        samples = []
        for index in sampled:
            traced = self._trace(tensors[index], generator)
            places = [place.sample(generator, SAMPLE_SIZE) for place in traced.places]
            samples.append(_Sample(tensors[index], places))
        return [sample for sample in samples if sample.places]

    def _can_be_compared(self, kind: Kind) -> bool:
        tensors = self._kinds[kind]
        stride = max(1, len(tensors) // _TRIES)
        used = False
        for tensor in tensors[::stride]:
            try:
                traced = self._trace(tensor, random.Random(tensor.name))
            except Exception as error:  # whatever an architecture's own loader raises
                return self._leave_out(kind, f"vLLM's loader does not take them alone: {shown(error)}")
            used |= traced.used
            if traced.places:
                if all(
                    self._weights.held_values(place.sample(random.Random(0), 1)) for place in traced.places
                ):
                    return True
                return self._leave_out(kind, "the layer packs them")
        if not used:
            self._unused.add(kind)
        return used  # another worker holds them all

    def _leave_out(self, kind: Kind, reason: str) -> bool:
        self._comparable.discard(kind)
        self.left_out[shown(kind[0])] = reason
        return False

    def _trace(self, tensor: TensorPlan, generator: random.Random) -> TracedTensor:
        return self._weights.trace(tensor.name, tensor.shape, generator)

    def _agree(self, sample: _Sample, exact: torch.Tensor) -> bool:
        places = {row: index for index, row in enumerate(sample.rows)}
        for place in sample.places:
            first, *others = place.origins.unbind(-1)
            first = first.clone().apply_(lambda row: places[int(row)])
            wanted = exact[(first, *others)]
            if not all(self._close(held, wanted) for held in self._weights.held_values(place)):
                return False
        return True

    def _close(self, held: torch.Tensor, exact: torch.Tensor) -> bool:
        rounded = exact.to(self._weights.dtype).float()
        # Products of float32 on a GPU may be TF32's.
        rtol = 2**-9 if self._weights.dtype == torch.float32 and torch.cuda.is_available() else 0
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
