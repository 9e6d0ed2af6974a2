"""A whole job file."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from expo_ray.config.evaluation import PromptSource, PublishedModel, RewardModel, Sampling, Serving
from expo_ray.config.fields import Device, Frozen, check_output, check_repo_id
from expo_ray.config.pairs import Pair, PairOptions
from expo_ray.config.search import Search


class Job(Frozen):
    """A job file: where to write, which pairs to extrapolate, and how to evaluate them."""

    output: Annotated[str, Field(min_length=1), AfterValidator(check_output)]
    """Root of everything written: a path, `s3://bucket/prefix`, `gs://...` or `az://...`. Models land in `pairs/<pair>/alpha=<alpha>/`."""

    pairs: tuple[Pair, ...] = ()
    """The pairs, each with at least `sft` and `dpo`."""

    models: tuple[PublishedModel, ...] = ()
    """Model folders to serve and evaluate beside the pairs."""

    defaults: PairOptions = PairOptions()
    """Options of every pair that does not set them itself."""

    device: Device = "auto"
    """Device of the arithmetic; the bytes are the same on each. `auto` means the CPU, as reading, hashing and writing take longer than the arithmetic there; with `cuda`, each shard asks for a quarter of a GPU."""

    prompts: tuple[PromptSource, ...] = ()
    """Prompts for the models."""

    sampling: Sampling = Sampling()
    """Settings of sampling."""

    serving: Serving = Serving()
    """The engines that answer."""

    rewards: tuple[RewardModel, ...] = ()
    """Scorers of the responses; the first one chooses alpha, the others guard it unless their `role` says otherwise."""

    search: Search = Search()
    """The search for alpha."""

    publish: Literal["winners", "all"] = "winners"
    """Models that `expo-ray run` publishes: the chosen alpha of each pair, or that and all `alphas` of the pair."""

    push_to: str | None = None
    """Repository on the Hugging Face Hub to which `expo-ray run` pushes each winner: `my-org/{pair}-expo`. A repository that it creates is private."""

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("defaults"), dict):
            return data
        pairs = data.get("pairs")
        if not isinstance(pairs, list):
            return data
        # Unknown keys are refused when `defaults` itself is validated.
        known = {key: value for key, value in data["defaults"].items() if key in PairOptions.model_fields}
        return data | {"pairs": [known | pair if isinstance(pair, dict) else pair for pair in pairs]}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.pairs and not self.models:
            raise ValueError(
                "there is nothing to work on; list at least 1 item under `pairs`, each with `sft` and `dpo`"
            )
        named = {
            # The endpoint knows both by name.
            "pairs": [item.name for item in self.pairs] + [item.name for item in self.models],
            "prompts": [item.name for item in self.prompts],
            "rewards": [item.name for item in self.rewards],
        }
        for section, names in named.items():
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise ValueError(f"{section}: {', '.join(twice)} is used twice; give each its own `name`")
        return self

    @field_validator("rewards")
    @classmethod
    def _assign_roles(cls, rewards: tuple[RewardModel, ...]) -> tuple[RewardModel, ...]:
        """Check that the first model chooses and no other; give a role to those that name none."""
        if rewards and rewards[0].role not in (None, "choose"):
            raise ValueError(
                f"{rewards[0].name} comes first and has `role: {rewards[0].role}`; the first reward model chooses alpha: list that one first"
            )
        choosing = [model.name for model in rewards[1:] if model.role == "choose"]
        if choosing:
            raise ValueError(
                f"{', '.join(choosing)}: only the first reward model has `role: choose`; list it first, or set `role: joint` to let both choose"
            )
        return tuple(
            model.model_copy(update={"role": model.role or ("guard" if number else "choose")})
            for number, model in enumerate(rewards)
        )

    @model_validator(mode="after")
    def _check_push_to(self) -> Self:
        if self.push_to is not None:
            if len(self.pairs) > 1 and "{pair}" not in self.push_to:
                raise ValueError(
                    f"push_to: {self.push_to!r} is one repository for {len(self.pairs)} pairs; write `{{pair}}` where their names go"
                )
            for pair in self.pairs:
                try:
                    check_repo_id(self.repo_of(pair.name) or "")
                except ValueError as error:
                    raise ValueError(f"push_to: {error}") from error
        return self

    def places(self, *sections: Literal["output", "pairs", "models", "rewards"]) -> dict[str, str]:
        """Paths and URIs of the models in these sections, and of the output, by where the job file names them."""
        named = {"output": self.output} if "output" in sections else {}
        if "pairs" in sections:
            named |= {f"pairs {pair.name}, sft": pair.sft for pair in self.pairs}
            named |= {f"pairs {pair.name}, dpo": pair.dpo for pair in self.pairs}
        if "models" in sections:
            named |= {f"models {model.name}": model.uri for model in self.models}
        if "rewards" in sections:
            models = (model for model in self.rewards if not model.is_function)
            named |= {f"rewards {model.name}": model.model for model in models}
        return named

    def repo_of(self, pair: str) -> str | None:
        """Repository of the Hub that a pair's winner is pushed to; None if it is not."""
        return self.push_to.replace("{pair}", pair) if self.push_to is not None else None
