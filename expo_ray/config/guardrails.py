"""The guardrails of a search: one table of their keys in a job file, names, units and limits.

A new guardrail is a field here and a measure in `expo_ray.evaluation.search`: of one response in `response_measures.py`, of all
responses together in `guardrails.py`. Figures, tables, help and messages follow from the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from expo_ray.config.fields import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Literal["ratio", "share", "nats"]


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


@dataclass(frozen=True)
class Label:
    """Texts of a guardrail outside the job file.

    Attributes:
        name: in `results.json` and in messages.
        title: of its curve in the report.
        unit: `ratio` to dpo's value, rise of a `share`, or `nats`.
    """

    name: str
    title: str
    unit: Unit


class Guardrails(Frozen):
    """Limits on what an alpha may change in the responses, relative to dpo on the same prompts, whatever its reward."""

    # In all 17 pairs of the paper (arXiv 2404.16792), responses grew by x1.04 to x1.30, and by x2.26 at alpha 8.
    length_ratio: Annotated[Limit, Label("length ratio", "Length over dpo's", "ratio")] = Limit(
        warn=1.3, reject=1.6
    )
    """Mean tokens of a response over dpo's; responses that shrink by as much count as well."""

    cut: Annotated[Limit, Label("cut", "Rise of responses cut at the token limit", "share")] = Limit(
        warn=0.05, reject=0.1
    )
    """Rise in the share of responses that end at the token limit."""

    repetition: Annotated[Limit, Label("repetition", "Rise of repeated text", "share")] = Limit(
        warn=0.05, reject=0.1
    )
    """Rise in the mean share of a response's text that repeats earlier text of it."""

    broken: Annotated[Limit, Label("broken", "Rise of empty responses and special tokens", "share")] = Limit(
        warn=0.01, reject=0.05
    )
    """Rise in the share of responses that are empty or contain special tokens."""

    kl: Annotated[Limit, Label("kl", "KL from dpo, nats per token", "nats")] = Limit(warn=0.5, reject=2.0)
    """KL divergence from dpo per token of dpo's own responses, in nats, where log-probabilities were collected."""

    # Without a label: it is looked at once, on the prompts that decide.
    bought: Limit = Limit(warn=0.25, reject=0.5)
    """Share of the gain that is gone at dpo's length, where responses are more than 5 % longer or shorter. It rejects only while no gain is
    shown at dpo's length."""

    def limit(self, name: str) -> Limit:
        """The limit of a guardrail of `GUARDRAILS`."""
        limit: Limit = getattr(self, _KEYS[name])
        return limit


_LABELS = {
    key: label
    for key, field in Guardrails.model_fields.items()
    for label in field.metadata
    if isinstance(label, Label)
}
_KEYS = {label.name: key for key, label in _LABELS.items()}
GUARDRAILS: Mapping[str, Label] = {label.name: label for label in _LABELS.values()}
"""By name, in the order of the report. The vetoes of other reward models are not among them: they have no limit to set."""
