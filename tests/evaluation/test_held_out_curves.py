"""The second family of curves is frozen: what nobody tunes on must not change under the search either."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from benchmarks import held_out_curves
from benchmarks.held_out_curves import KINDS, NUM_PROMPTS, HeldOutPair
from expo_ray.evaluation.statistics import standard_error
from tests.support.paths import ROOT

# Of the file; and of means of rewards and lengths, which would also change with numpy's generators.
SOURCE, VALUES = "5212fb7b9cec3ade", "845a2b350aa53757"


def test_the_file_is_the_one_that_was_frozen() -> None:
    source = (ROOT / "benchmarks" / "held_out_curves.py").read_bytes()
    assert hashlib.sha256(source).hexdigest()[:16] == SOURCE, "put another kind of curve into another file"


def test_the_values_are_those_that_were_frozen() -> None:
    pairs = [HeldOutPair(kind, 2, null) for kind in KINDS for null in (False, True)]
    means = [
        f"{pair.rewards(half, alpha).mean():.4f} {pair.lengths(half, alpha).mean():.2f}"
        for pair in pairs
        for half in (0, 1)
        for alpha in (0.0, 0.03, 1.0, 25.0)
    ]
    assert hashlib.sha256(" ".join(means).encode()).hexdigest()[:16] == VALUES


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_scatter_around_the_true_gain_and_do_not_change(kind: str) -> None:
    pair = HeldOutPair(kind, seed=1)
    for half, alpha in ((0, 0.4), (1, 1.7)):
        gains = pair.rewards(half, alpha) - pair.rewards(half, 0.0)
        error = standard_error(pair.rewards(half, alpha), pair.rewards(half, 0.0))
        assert gains.mean() == pytest.approx(pair.gain(alpha), abs=4 * error)
        assert (pair.rewards(half, alpha) == HeldOutPair(kind, seed=1).rewards(half, alpha)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_gain_and_its_null_has_none(kind: str) -> None:
    for seed in range(20):
        assert HeldOutPair(kind, seed).attainable() > 0.02
        assert HeldOutPair(kind, seed, null=True).attainable() == 0


def test_responses_at_a_small_alpha_are_often_dpos_and_a_gain_bought_with_length_is_none() -> None:
    pair = HeldOutPair("plateau", seed=3)
    dpo = pair.rewards(0, 0.0)
    correlations = [np.corrcoef(dpo, pair.rewards(0, alpha))[0, 1] for alpha in (0.01, 1.0)]
    assert correlations[0] > 0.9
    assert correlations[1] < 0.8
    bought = HeldOutPair("bought with length", seed=0)
    top = max(np.geomspace(0.1, 10, 50), key=bought.gain)
    assert bought.quality(top) < 0 < bought.gain(top)
    assert bought.lengths(0, top).mean() > 1.05 * bought.lengths(0, 0.0).mean()
    assert len(bought.lengths(0, top)) == NUM_PROMPTS == held_out_curves.NUM_PROMPTS
