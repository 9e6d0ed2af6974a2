"""Sections of a job file about choosing alpha."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from expo_ray.config.fields import Alphas, Frozen


def check_rungs(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`sizes` themselves, if each is larger than the one before."""
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{list(sizes)} does not rise; list the sizes from the smallest to the largest")
    return sizes


Group = Literal["attention", "mlp", "embeddings"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rungs = Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1), AfterValidator(check_rungs)]


class Limit(Frozen):
    """The values at which a guardrail warns, and at which it rejects an alpha."""

    warn: Positive
    """The report warns above this."""

    reject: Positive
    """An alpha above this is not chosen, and the ladder climbs no further."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.warn > self.reject:
            raise ValueError(
                f"warn is {self.warn} and reject {self.reject}; set `warn` to at most `reject`, or raise `reject`"
            )
        return self


class Guardrails(Frozen):
    """Limits on what an alpha may change in the responses, relative to dpo on the same prompts, whatever its reward."""

    length_ratio: Limit = Limit(warn=1.3, reject=1.6)
    """Mean tokens of a response over dpo's; responses that shrink by as much count as well."""

    cut: Limit = Limit(warn=0.05, reject=0.1)
    """Rise in the share of responses that end at the token limit."""

    repetition: Limit = Limit(warn=0.05, reject=0.1)
    """Rise in the mean share of a response's text that repeats earlier text of it."""

    broken: Limit = Limit(warn=0.01, reject=0.05)
    """Rise in the share of responses that are empty or contain special tokens."""

    kl: Limit = Limit(warn=0.5, reject=2.0)
    """KL divergence from dpo per token of dpo's own responses, in nats, where log-probabilities were collected."""


class Search(Frozen):
    """The search for alpha."""

    method: Literal["ladder", "grid"] = "ladder"
    """`ladder` doubles alpha until the reward falls or a guardrail trips, and then refines around the best; `grid` tries
    `alphas` on the largest number of prompts."""

    alphas: Alphas = (0.1, 0.2, 0.3, 0.4, 0.5)
    """The alphas of `grid`, beside dpo. Those below 0 interpolate: they are drawn, and never chosen."""

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
