"""Sections of a job file about choosing alpha."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from expo_ray.config.fields import Alphas, Frozen
from expo_ray.config.guardrails import Guardrails, Positive


def check_rungs(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`sizes` themselves, if each is larger than the one before."""
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{list(sizes)} does not rise; list the sizes from the smallest to the largest")
    return sizes


Method = Literal["surface", "ladder", "grid"]
Group = Literal["attention", "mlp", "embeddings"]
Rungs = Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1), AfterValidator(check_rungs)]


# Prompts seen after each round. On 64 prompts the standard error of a gain is 0.26 where single differences deviate by 2.1
# (benchmarks/results/alpha_search.md): enough to see a collapse, which costs several rewards. For `surface`, a curve through all alphas says
# the rest. In `ladder`, each round has twice the prompts for about half the alphas, so that rounds cost the same (successive halving), and
# the last has as many prompts as the paper.
_PROMPTS: Mapping[Method, tuple[int, ...]] = {
    "surface": (64, 128, 256, 512),
    "ladder": (128, 256, 512, 1000),
    "grid": (128, 256, 512, 1000),
}
# The most that the last look needs: `surface` looks at 128, 256 and 512 first.
_CONFIRM_PROMPTS: Mapping[Method, int] = {"surface": 1000, "ladder": 512, "grid": 512}


class Search(Frozen):
    """The search for alpha."""

    method: Method = "surface"
    """`surface` fits the gain as a curve over alpha and asks where it tells most; `ladder` doubles alpha until the reward falls or a
    guardrail trips, and then refines around the best; `grid` tries `alphas` on the largest number of prompts."""

    alphas: Alphas = (0.1, 0.2, 0.3, 0.4, 0.5)
    """The alphas of `grid`, beside dpo. Those below 0 interpolate: they are drawn, and never chosen."""

    prompts: Rungs = Field(default_factory=lambda data: _PROMPTS[data["method"]])
    """Prompts seen after each round of the search, by default 64, 128, 256 and 512 for `surface` and 128, 256, 512 and 1,000 for the others;
    never more than the set has."""

    confirm_prompts: Annotated[int, Field(ge=16)] = Field(
        default_factory=lambda data: _CONFIRM_PROMPTS[data["method"]]
    )
    """Untouched prompts on which the picked alpha is compared with dpo at the end, by default 1,000 for `surface`, which may be content with
    128, 256 or 512, and 512 for the others, 1,000 where a reward model guards; never more than the set has."""

    largest_alpha: Positive = 51.2
    """The climb goes no further."""

    objective: Literal["reward", "length_controlled"] = "reward"
    """What alpha has to gain by the model that chooses: its reward, or what is left of the gain at the length of dpo's responses."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of all intervals; alpha is above 0 only where the lower bound of its gain over dpo is."""

    guardrails: Guardrails = Guardrails()
    """Limits on what an alpha may change in the responses."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_groups(cls, data: Any) -> Any:
        """Name the remedy to job files of the time when the search also tried multipliers; an empty list asked for nothing."""
        if not isinstance(data, dict) or "groups" not in data:
            return data
        if data["groups"]:
            raise ValueError(
                "`groups` is no longer searched: on three real pairs, no multiplier was better than alpha alone. Remove the line; to give "
                "parts of a model more or less of alpha, set `multipliers` of the pair, such as `multipliers: {mlp: 0.5}`"
            )
        return {key: value for key, value in data.items() if key != "groups"}

    def identity(self) -> dict[str, Any]:
        """Give all that decides a search. Settings that are newer than stored searches are left out at their defaults."""
        # As it was when the search also tried multipliers, and a job asked for none.
        settings: dict[str, Any] = self.model_dump(mode="json") | {"groups": []}
        if self.objective == "reward":
            del settings["objective"]
        if self.guardrails.bought == Guardrails().bought:
            del settings["guardrails"]["bought"]
        return settings
