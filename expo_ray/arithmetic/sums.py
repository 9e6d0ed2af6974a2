"""What one pass over a tensor tells about it, kept as sums so that chunks add up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Sums over the elements that were extrapolated (not over those copied).

    Attributes:
        elements: how many there are.
        changed: how many differ between sft and dpo.
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
        """`<out - dpo, delta> / <delta, delta>`: the alpha that the written weights really carry; 0 without a delta."""
        return self.moved_delta / self.delta_square if self.delta_square else 0.0

    @property
    def relative_delta(self) -> float:
        """RMS(delta) / RMS(dpo); 0 where dpo is all zero."""
        return sqrt(self.delta_square / self.dpo_square) if self.dpo_square else 0.0

    @property
    def changed_share(self) -> float:
        return self.changed / self.elements if self.elements else 0.0
