"""A step from dpo to another model of its pair: alpha, and what it is multiplied by in groups of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from expo_ray.config import Group, format_alpha
from expo_ray.config.fields import check_alpha
from expo_ray.extrapolation.match import multiplier_of
from expo_ray.extrapolation.plan import PairPlan

# Names of modules in the architectures of `transformers`. The dot keeps norms such as `post_attention_layernorm` out.
GROUPS: Mapping[Group, str] = {
    "attention": r"(attn|attention)\.",
    "mlp": r"(mlp|moe|ffn|feed_forward|experts)\.|\.fc[12]\.",
    "embeddings": r"embed|wte\.|wpe\.|lm_head",
}


@dataclass(frozen=True, slots=True)
class Step:
    """A model of a pair, by its distance from dpo. Its text follows the `@` of a served name: `0.8` or `0.8,mlp=0.5`.

    Attributes:
        alpha: finite, at least -1.
        factors: a group and what alpha is multiplied by there, in the order of `GROUPS`, without those of 1.
    """

    alpha: float
    factors: tuple[tuple[Group, float], ...] = ()

    @classmethod
    def of(cls, alpha: float, factors: Mapping[Group, float]) -> Self:
        """Make a step in its canonical form, so that equal steps are equal objects with equal texts.

        Raises:
            ValueError: if alpha, in any group, is not a finite number of at least -1, or a factor is below 0.
        """
        for group, factor in factors.items():
            if factor < 0:
                raise ValueError(
                    f"{group} is {factor:g}; write what alpha is multiplied by there, at least 0"
                )
            check_alpha(alpha * factor)
        # + 0.0 makes -0.0 the same text, and the same weights, as 0.
        kept = tuple((group, factors[group] + 0.0) for group in GROUPS if factors.get(group, 1) != 1)
        return cls(check_alpha(alpha), kept)

    def __str__(self) -> str:
        return ",".join(
            [format_alpha(self.alpha), *(f"{group}={format_alpha(factor)}" for group, factor in self.factors)]
        )

    def multipliers(self, own: Mapping[str, float]) -> dict[str, float]:
        """`multipliers` of a pair at this step: its own, which count first, and those of the groups."""
        # The first pattern that matches a name counts. A dict keeps the place of a repeated key: own patterns stay in front, and
        # the last `**own` gives them their values back.
        return {**own, **{GROUPS[group]: factor for group, factor in self.factors}, **own}


DPO = Step(0.0)
SFT = Step(-1.0)


def parse_step(text: str) -> Step:
    """Read the text of a step, with its groups in any order.

    Raises:
        ValueError: if it is no step.
    """
    alpha, *parts = text.split(",")
    factors: dict[Group, float] = {}
    for part in parts:
        name, _, factor = part.partition("=")
        group = next((group for group in GROUPS if group == name), None)
        if group is None or group in factors:
            raise ValueError(
                f"{part!r} is not one of {', '.join(f'{group}=0.5' for group in GROUPS)}, each at most once"
            )
        factors[group] = _number(factor)
    return Step.of(_number(alpha), factors)


def stepped(plan: PairPlan, step: Step) -> PairPlan:
    """The same plan with the multipliers of `step` behind the pair's own."""
    if not step.factors:
        return plan
    multipliers = step.multipliers(plan.options.multipliers)
    options = plan.options.model_copy(update={"multipliers": multipliers})
    shards = tuple(
        replace(
            shard,
            tensors=tuple(
                # Tied copies share the name that seeds them, and so their multiplier.
                replace(tensor, multiplier=multiplier_of(tensor.random_name, options))
                for tensor in shard.tensors
            ),
        )
        for shard in plan.shards
    )
    return replace(plan, options=options, shards=shards)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error
