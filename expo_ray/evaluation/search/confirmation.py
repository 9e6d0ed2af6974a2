"""Confirmation of a picked alpha on untouched prompts: one look, or a few at more and more of them.

Each look but the last spends a small share of the error, so that only a gain that is plain on few prompts ends the confirmation early; the
last look has the rest. The shares add up to the error (Bonferroni), which holds however the looks hang together. Where not even the
optimistic end of the gain could be confirmed at the last look, the others are saved.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from expo_ray.config import Search
from expo_ray.evaluation.search.history import Half, Rung
from expo_ray.evaluation.search.roles import role_tests
from expo_ray.evaluation.statistics import NORMAL, standard_error
from expo_ray.report.results import RoleTest

# Prompts at which a sequential confirmation looks, up to the number that the settings allow.
_LOOKS = (128, 256, 512)
# Share of the one-sided error that each look but the last spends.
_EARLY = 0.001
# Where a gain whose one-sided upper end, at 99 %, stays below what is confirmed in half of all cases, the confirmation ends. Ending early
# can only keep dpo, so it costs power and no error.
_OPTIMISTIC = NORMAL.inv_cdf(0.99)
_NEEDED = 2.0
# Prompts that a guard takes at least, unless the job names a number: with a margin of 0.1, 1,000 pass an alpha that is as good as dpo in nine of
# ten cases, 512 in six of ten.
_GUARDED = 1000


@dataclass(frozen=True)
class Look:
    """A look at the confirming half.

    Attributes:
        num_prompts: the first ones of the half.
        confidence: of the two-sided interval whose lower end decides.
        is_last: no other follows.
    """

    num_prompts: int
    confidence: float
    is_last: bool


def looks_of(num_prompts: int, settings: Search, *, guarded: bool) -> tuple[Look, ...]:
    """The looks at a confirming half with this many prompts; `guarded` where some reward model must exclude a loss."""
    most = settings.confirm_prompts
    if guarded and "confirm_prompts" not in settings.model_fields_set:
        most = max(most, _GUARDED)
    most = min(num_prompts, most)
    sequential = settings.method == "surface"
    sizes = [*(size for size in _LOOKS if size < most and sequential), most]
    error = (1 - settings.confidence) / 2
    early = min(_EARLY, error / len(sizes))
    last = error - early * (len(sizes) - 1)
    return tuple(
        Look(size, 1 - 2 * (last if size == most else early), is_last=size == most) for size in sizes
    )


def confirm(half: Half, settings: Search, alpha: float, *, guarded: bool) -> Generator[Rung, Rung, Look]:
    """Compare an alpha with dpo on the untouched half, look by look; return the look that ended it."""
    looks, seen = looks_of(half.num_prompts, settings, guarded=guarded), 0
    for look in looks:
        count = f"confirmation on {look.num_prompts} prompts" if len(looks) > 1 else "confirmation"
        yield Rung("confirm", (0.0, alpha), seen, look.num_prompts, count)
        seen = look.num_prompts
        tests = tests_at(half, alpha, look)
        if all(test.passed for test in tests) or _is_futile(half, alpha, look, tests, looks[-1]):
            return look
    return looks[-1]


def tests_at(half: Half, alpha: float, look: Look) -> tuple[RoleTest, ...]:
    """Test an alpha by each reward model in its role, with the intervals of this look."""
    return role_tests("confirm", *half.beside_dpo(alpha, look.num_prompts), half.roles, look.confidence)


def _is_futile(half: Half, alpha: float, look: Look, tests: Sequence[RoleTest], last: Look) -> bool:
    """True if some reward model has hardly a chance to pass the alpha at the last look."""
    scores, dpo = half.beside_dpo(alpha, look.num_prompts)
    errors = [
        standard_error(
            scores.rewards[test.reward_model], dpo.rewards[test.reward_model], clusters=dpo.clusters
        )
        for test in tests
    ]
    return any(
        test.gain.mean + _OPTIMISTIC * error
        < test.limit + smallest_confirmed(error * math.sqrt(look.num_prompts), last.num_prompts)
        for test, error in zip(tests, errors, strict=True)
    )


def smallest_confirmed(deviation: float, num_prompts: int) -> float:
    """The gain that about half of all confirmations on this many prompts would show.

    Args:
        deviation: standard deviation of a paired difference.
        num_prompts: at the last look.
    """
    return _NEEDED * deviation / math.sqrt(num_prompts)
