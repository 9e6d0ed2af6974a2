"""Sections of a job file about choosing alpha."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from expo_ray.config.fields import Alphas, Frozen
from expo_ray.config.guardrails import Guardrails, Positive


def check_rungs(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`sizes` themselves, if each is larger than the one before."""
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{list(sizes)} does not rise; list the sizes from the smallest to the largest")
    return sizes


Method = Literal["ladder", "grid"]
Group = Literal["attention", "mlp", "embeddings"]
Rungs = Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1), AfterValidator(check_rungs)]


class Search(Frozen):
    """The search for alpha."""

    method: Method = "ladder"
    """`ladder` doubles alpha until the reward falls or a guardrail trips, and then refines around the best; `grid` tries
    `alphas` on the largest number of prompts."""

    alphas: Alphas = (0.1, 0.2, 0.3, 0.4, 0.5)
    """The alphas of `grid`, beside dpo. Those below 0 interpolate: they are drawn, and never chosen."""

    # On 128 prompts the standard error of a gain is 0.19 where single differences deviate by 2.1 (benchmarks/results/alpha_search.md):
    # enough to see a collapse, which costs several rewards, and too little to choose. Each round then has twice the prompts for about half
    # the alphas, so that rounds cost the same (successive halving). The last has as many prompts as the paper.
    prompts: Rungs = (128, 256, 512, 1000)
    """Prompts of each round of the search, all but the last on few; never more than the set has."""

    confirm_prompts: Annotated[int, Field(ge=16)] = 512
    """Untouched prompts on which the picked alpha is compared with dpo at the end; never more than the set has."""

    largest_alpha: Positive = 51.2
    """The ladder climbs no further."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of all intervals; alpha is above 0 only where the lower bound of its gain over dpo is."""

    groups: tuple[Group, ...] = ()
    """Groups of tensors in which alpha is multiplied by 0, 0.5 and 2 as well, once alpha is chosen; what is better than alpha
    alone is taken. `multipliers` of the pair count first."""

    guardrails: Guardrails = Guardrails()
    """Limits on what an alpha may change in the responses."""
