"""What the statistics of a finished model tell a user to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from expo_ray.arithmetic.rule import ROUNDINGS
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.config import format_alpha
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.text import first_few

EFFECTIVE_ALPHA_TOLERANCE = 0.05
# RMS(delta)/RMS(dpo) of DPO and RLHF runs lies around 1e-3 (2.6e-3 on the example pair); supervised fine-tuning of a base
# model moves its weights ten times as far, and extrapolating that is a known failure (paper, section 4.3).
LARGEST_ALIGNMENT_DELTA = 3e-2


def warnings_of(plan: PairPlan, alpha: float, statistics: Mapping[str, TensorStatistics]) -> Iterator[str]:
    """Warnings for the model of `plan` at `alpha`, given the statistics of its tensors."""
    multipliers = {tensor.name: tensor.multiplier for shard in plan.shards for tensor in shard.tensors}
    wanted = {name: alpha * multipliers[name] * one.delta_square for name, one in statistics.items()}
    total = sum(statistics.values(), TensorStatistics())
    if _off(total.moved_delta, sum(wanted.values())):
        nominal = sum(wanted.values()) / total.delta_square
        off = [name for name, one in statistics.items() if _off(one.moved_delta, wanted[name])]
        yield (
            f"the effective alpha is {total.effective_alpha:.3f} where {nominal:.3g} was asked for: {ROUNDINGS[plan.options.rounding].loss} "
            f"(most in {first_few(off, 3)})"
        )
    if total.relative_delta > LARGEST_ALIGNMENT_DELTA:
        yield (
            f"dpo differs from sft by {total.relative_delta:.1%} of the weights' RMS, more than alignment training does; if sft is "
            f"a base model and dpo its fine-tuned one, alpha {format_alpha(alpha)} will likely break it"
        )


def _off(moved: float, wanted: float) -> bool:
    return wanted != 0 and abs(moved / wanted - 1) > EFFECTIVE_ALPHA_TOLERANCE
