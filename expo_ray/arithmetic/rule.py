"""What an extrapolated weight is, declared bit for bit; the kernels that compute it live beside this file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol

from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES

Rounding = Literal["nearest", "stochastic", "reference"]

_KEPT = (
    "elements without a delta keep dpo's value (infinities and NaN that both parents share: dpo's bits), "
    "alpha 0 gives dpo and alpha -1 gives sft, any other NaN is the canonical one"
)
_EXACT = (
    "dpo + alpha * (dpo - sft) as three IEEE operations without FMA, in float32 for BF16 and F16 parents and in float64 "
    "as soon as one parent is F32 or F64, alpha first rounded to that type"
)

# Printed in every manifest. A change of a sentence is a change of the bytes, and the other way round.
FORMULAS: Mapping[Rounding, str] = {
    "nearest": f"{_EXACT}; rounded once to the output dtype, ties to even; {_KEPT}.",
    "stochastic": (
        f"{_EXACT}; rounded to one of the two neighbours in BF16 or F16, up with the probability that makes the mean exact "
        "(to 2^-32), by random bits that are a function of seed, tensor name and element index alone; F32 and F64 outputs "
        f"rounded to nearest, ties to even; {_KEPT}."
    ),
    "reference": (
        "parents converted to BF16, then dpo + alpha * (dpo - sft) rounded to BF16 after the difference, the product and the "
        "sum, with alpha in float32; infinities and NaN that both parents share keep dpo's value, any other NaN is the "
        "canonical one."
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """All that decides the bytes of one tensor besides its parents, alpha and the seed.

    Attributes:
        dpo_dtype: safetensors' name: BF16, F16, F32 or F64.
        sft_dtype: likewise; need not be dpo's.
        out_dtype: likewise; BF16 under `reference`.
    """

    dpo_dtype: str
    sft_dtype: str
    out_dtype: str
    rounding: Rounding

    def __post_init__(self) -> None:
        assert {self.dpo_dtype, self.sft_dtype, self.out_dtype} <= set(WEIGHT_DTYPES), self
        assert self.rounding in FORMULAS, self
        assert self.rounding != "reference" or self.out_dtype == "BF16", self


def compute_dtype(rule: Rule) -> Literal["F32", "F64"]:
    """The type that holds both parents exactly, in which `nearest` and `stochastic` compute."""
    return "F32" if {rule.dpo_dtype, rule.sft_dtype} <= {"BF16", "F16"} else "F64"


def random_key(seed: int, tensor: str) -> int:
    """64 bits that choose the random stream of one tensor; the same for every alpha, device and chunk."""
    return int.from_bytes(sha256(f"{seed}:{tensor}".encode("utf-8", "surrogatepass")).digest()[:8], "little")


class Kernel(Protocol):
    """One chunk of both parents in, one chunk per alpha out. Safe to call from several threads; runs without the GIL."""

    def __call__(
        self,
        dpo: memoryview,
        sft: memoryview,
        outs: Sequence[memoryview],
        *,
        alphas: Sequence[float],
        key: int,
        first: int,
    ) -> list[TensorStatistics]:
        """Extrapolate a run of elements of one tensor.

        Args:
            dpo: contiguous little-endian elements of the rule's `dpo_dtype`; any alignment (an address that is no
                multiple of the element's size costs one more copy).
            sft: as many elements of the rule's `sft_dtype`.
            outs: one writable buffer per alpha, for as many elements of the rule's `out_dtype`.
            alphas: finite, >= -1.
            key: from `random_key`; used by `stochastic` alone.
            first: index within the tensor of the chunk's first element; chunks may begin and end anywhere.

        Returns:
            One per alpha. Sums do not depend on machine, device or threads. Sums over chunks are added in float64,
            so another division into chunks may change their last digits (not the counts, and never the weights).
        """


def statistics_from_sums(elements: int, shared: Any, per_alpha: Any) -> list[TensorStatistics]:
    """Name what a kernel has added up.

    Args:
        shared: changed, nan, inf, dpo_square, delta_square.
        per_alpha: a row of overflow, moved_delta for each alpha.
    """
    changed, nan, inf, dpo_square, delta_square = (float(value) for value in shared)
    return [
        TensorStatistics(
            elements=elements,
            changed=int(changed),
            dpo_square=dpo_square,
            delta_square=delta_square,
            moved_delta=float(moved_delta),
            nan=int(nan),
            inf=int(inf),
            overflow=int(overflow),
        )
        for overflow, moved_delta in per_alpha
    ]


@functools.cache
def kernel_for(rule: Rule, device: str = "cpu") -> Kernel:
    """The kernel of a rule, compiled and ready.

    Args:
        device: `cpu` or `cuda`, as `on_device.resolve_device` gives it; both write the same bytes.
    """
    # Either import costs 0.2 s and more, and neither is needed to plan or to read a manifest.
    if device == "cpu":
        from expo_ray.arithmetic.cpu.kernel import CpuKernel

        return CpuKernel(rule)
    from expo_ray.arithmetic.kernels import DeviceKernel

    return DeviceKernel(rule, device)
