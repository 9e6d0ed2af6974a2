"""Served names: `<pair>@<alpha>`, `<pair>` for dpo, or the name of a published model."""

from __future__ import annotations

from dataclasses import dataclass

from expo_ray.errors import ExpoError
from expo_ray.extrapolation.step import Step, parse_step


class NameFault(ExpoError):
    """A request names something that is not served."""


@dataclass(frozen=True, slots=True)
class ServedName:
    """What a request asks for.

    Attributes:
        base: a pair or a published model.
        step: None where the name has none; a pair then answers as dpo.
    """

    base: str
    step: Step | None

    def __str__(self) -> str:
        return self.base if self.step is None else f"{self.base}@{self.step}"


def parse_name(text: str) -> ServedName:
    """Take a name apart.

    Raises:
        NameFault: if what follows the `@` is no step.
    """
    base, at, step = text.partition("@")
    if not at:
        return ServedName(base, None)
    try:
        return ServedName(base, parse_step(step))
    except ValueError as error:
        raise NameFault(
            f"model {text!r}: {error}; write `{base}@0.5`, with any finite number of at least -1"
        ) from error
