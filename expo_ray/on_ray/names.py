"""Served names: `<pair>@<alpha>`, `<pair>` for alpha 0, or the name of a published model."""

from __future__ import annotations

from dataclasses import dataclass

from expo_ray.config.fields import check_alpha, format_alpha
from expo_ray.errors import ExpoError


class NameFault(ExpoError):
    """A request names something that is not served."""


@dataclass(frozen=True, slots=True)
class ServedName:
    """What a request asks for.

    Attributes:
        base: a pair or a published model.
        alpha: None where the name has none.
    """

    base: str
    alpha: float | None

    def __str__(self) -> str:
        return self.base if self.alpha is None else f"{self.base}@{format_alpha(self.alpha)}"


def parse_name(text: str) -> ServedName:
    """Take a name apart.

    Raises:
        NameFault: if what follows the `@` is no alpha.
    """
    base, at, alpha = text.partition("@")
    if not at:
        return ServedName(base, None)
    try:
        return ServedName(base, check_alpha(float(alpha)))
    except ValueError as error:
        reason = str(error) if str(error).startswith("alpha") else f"{alpha!r} is not a number"
        raise NameFault(
            f"model {text!r}: {reason}; write `{base}@0.5`, with any finite number of at least -1"
        ) from error
