"""The declaration, bit for bit, of an extrapolated weight. The kernels that compute it are in `cpu/` and `gpu/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from expo_ray.checkpoint.tensors import WEIGHT_DTYPES
from expo_ray.config.fields import OutputDtype, RoundingName

_KEPT = (
    "elements without a delta keep dpo's value (infinities and NaN that both parents share: dpo's bits), "
    "alpha 0 gives dpo and alpha -1 gives sft, any other NaN is the canonical one"
)
# No FMA: it rounds product and sum at once, so the bytes would depend on whether a processor has it and a compiler uses it.
# Three IEEE 754 operations give the same bits everywhere. Their two extra roundings are at most 2^-24 of a term each, 1/65536 of
# what the final rounding to BF16 loses.
_EXACT = (
    "dpo + alpha * (dpo - sft) as three IEEE operations without FMA, in float32 for BF16 and F16 parents and in float64 "
    "as soon as one parent is F32 or F64, alpha first rounded to that type"
)


@dataclass(frozen=True, slots=True)
class Rounding:
    """A way to compute and round a weight.

    Its name is declared in `config/fields.py`, and the kernels implement it in `cpu/blocks.py` and `gpu/elements.py`. Everything
    else reads this object, so a new one touches these four files.

    Attributes:
        formula: printed in every manifest. A change of the sentence is a change of the bytes, and the other way round.
        output_dtype: the dtype of written weights if the mode allows one only; `keep` if the user chooses.
        loss: why the effective alpha may differ from the one asked for, and what to do about it.
    """

    formula: str
    output_dtype: OutputDtype
    loss: str


# Names of dtypes in job files, and those of safetensors.
OUTPUT_DTYPES: Mapping[OutputDtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

ROUNDINGS: Mapping[RoundingName, Rounding] = {
    "nearest": Rounding(
        formula=f"{_EXACT}; rounded once to the output dtype, ties to even; {_KEPT}.",
        output_dtype="keep",
        loss="rounding to nearest loses small changes; use `rounding: stochastic` or `dtype: fp32`",
    ),
    "stochastic": Rounding(
        formula=(
            f"{_EXACT}; rounded to one of the two neighbours in BF16 or F16, up with the probability that makes the mean "
            "exact (to 2^-32), by random bits that are a function of seed, tensor name and element index alone; F32 and F64 "
            f"outputs rounded to nearest, ties to even; {_KEPT}."
        ),
        output_dtype="keep",
        loss=(
            "stochastic rounding is exact in the mean only, and so few weights differ that its noise shows; use `dtype: fp32`"
        ),
    ),
    "reference": Rounding(
        formula=(
            "parents converted to BF16, then dpo + alpha * (dpo - sft) rounded to BF16 after the difference, the product and "
            "the sum, with alpha in float32; infinities and NaN that both parents share keep dpo's value, any other NaN is the "
            "canonical one."
        ),
        output_dtype="bf16",  # the paper's script loads, computes and saves in bf16
        loss=(
            "rounding to bf16 at each step loses small changes; use `rounding: stochastic`, or `nearest` with `dtype: fp32`"
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """All that decides the bytes of one tensor besides its parents, alpha and the seed.

    Attributes:
        dpo_dtype: safetensors' name: BF16, F16, F32 or F64.
        sft_dtype: likewise; need not be dpo's.
        out_dtype: likewise; the rounding's own, if it has one.
    """

    dpo_dtype: str
    sft_dtype: str
    out_dtype: str
    rounding: RoundingName

    def __post_init__(self) -> None:
        assert {self.dpo_dtype, self.sft_dtype, self.out_dtype} <= set(WEIGHT_DTYPES), self
        own_dtype = ROUNDINGS[self.rounding].output_dtype
        assert own_dtype == "keep" or self.out_dtype == OUTPUT_DTYPES[own_dtype], self

    @property
    def compute_dtype(self) -> Literal["F32", "F64"]:
        """The type that holds both parents exactly, in which `nearest` and `stochastic` compute."""
        return "F32" if {self.dpo_dtype, self.sft_dtype} <= {"BF16", "F16"} else "F64"


def random_key(seed: int, tensor: str) -> int:
    """64 bits that choose the random stream of one tensor; the same for every alpha, device and chunk."""
    return int.from_bytes(sha256(f"{seed}:{tensor}".encode("utf-8", "surrogatepass")).digest()[:8], "little")
