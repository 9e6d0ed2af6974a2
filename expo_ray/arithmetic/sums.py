"""Statistics of one tensor, taken in the pass that computes it and kept as sums, so that chunks can be added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import sqrt

from expo_ray.config import format_alpha
from expo_ray.errors import ArithmeticFault


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Sums over the elements that were extrapolated (not over those copied).

    Attributes:
        elements: number of elements.
        changed: number of elements that differ between sft and dpo.
        dpo_square: sum of dpo^2.
        delta_square: sum of delta^2, where delta = dpo - sft.
        moved_delta: sum of (out - dpo) * delta, `out` as written.
        nan: NaN elements in either parent.
        inf: infinite elements in either parent.
        overflow: elements finite in both parents and not in `out`.
    """

    elements: int = 0
    changed: int = 0
    dpo_square: float = 0.0
    delta_square: float = 0.0
    moved_delta: float = 0.0
    nan: int = 0
    inf: int = 0
    overflow: int = 0

    def __add__(self, other: TensorStatistics) -> TensorStatistics:
        return TensorStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def effective_alpha(self) -> float:
        """`<out - dpo, delta> / <delta, delta>`: the alpha that the written weights carry; 0 without a delta."""
        return self.moved_delta / self.delta_square if self.delta_square else 0.0

    @property
    def relative_delta(self) -> float:
        """RMS(delta) / RMS(dpo); 0 where dpo is all zero."""
        return sqrt(self.delta_square / self.dpo_square) if self.dpo_square else 0.0

    @property
    def changed_share(self) -> float:
        return self.changed / self.elements if self.elements else 0.0


def statistics_from_sums(
    elements: int, shared: Iterable[float], per_alpha: Iterable[Iterable[float]]
) -> list[TensorStatistics]:
    """Statistics of each alpha from what a kernel has added up.

    Args:
        elements: number of elements of the chunk.
        shared: changed, nan, inf, dpo_square, delta_square.
        per_alpha: overflow and moved_delta of each alpha.
    """
    changed, nan, inf, dpo_square, delta_square = map(float, shared)
    return [
        TensorStatistics(
            elements=elements,
            changed=int(changed),
            dpo_square=dpo_square,
            delta_square=delta_square,
            moved_delta=float(moved_delta),
            nan=int(nan),
            inf=int(inf),
            overflow=int(overflow),
        )
        for overflow, moved_delta in per_alpha
    ]


def refuse_broken(name: str, statistics: Sequence[TensorStatistics], alpha: float) -> None:
    """Refuse values that no model can have.

    Raises:
        ArithmeticFault: if the statistics of a tensor count any.
    """
    for sums in statistics:
        if sums.nan or sums.inf or sums.overflow:
            raise ArithmeticFault(
                f"{name} at alpha {format_alpha(alpha)}: {sums.nan} NaN, {sums.inf} infinite and {sums.overflow} overflowing "
                "elements; choose a smaller alpha, or repair the parents"
            )
