"""The search by a response surface and its sequential confirmation, over curves that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expo_ray.config import Search
from expo_ray.evaluation.search.confirmation import looks_of
from expo_ray.evaluation.search.decision import decide
from expo_ray.evaluation.search.history import Rung
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.storage import open_store
from tests.support.searched_pairs import Curve, Pair, flat, hill

SURFACE = Search(method="surface")


@pytest.mark.parametrize("best", [0.15, 0.5, 2.0, 9.0])
def test_the_top_of_a_hill_is_found_with_few_responses(best: float) -> None:
    curve = hill(best)
    pair = Pair(curve)
    decision = pair.search(SURFACE)
    assert curve(decision.alpha) > 0.85
    (confirmed,) = (measured for measured in pair.evidence(decision) if measured.half == "confirm")
    assert confirmed.gain.low > 0
    assert pair.history.generations < 2700


def test_rounds_ask_new_prompts_at_dpo_and_three_alphas_and_the_confirmation_only_what_it_lacks() -> None:
    pair = Pair(hill(1.0, 0.4))
    decision = pair.search(SURFACE)
    climb = [rung for rung in pair.asked if rung.stage == "climb"]
    assert climb[0].alphas == (0, 0.1, 0.2, 0.4)
    assert {(rung.start, rung.stop) for rung in climb} == {(0, 64)}
    rounds = [rung for rung in pair.asked if rung.stage.startswith("round")]
    assert [(rung.start, rung.stop) for rung in rounds] == [(64, 128), (128, 256), (256, 512)][: len(rounds)]
    assert len(rounds) >= 2
    for rung in rounds:
        assert rung.alphas[0] == 0
        assert len(rung.alphas) == 4
        assert list(rung.alphas) == [float(f"{alpha:.2g}") for alpha in rung.alphas]
    looks = [rung for rung in pair.asked if rung.half == "confirm"]
    assert [rung.start for rung in looks] == [0, *(rung.stop for rung in looks[:-1])]
    assert all(rung.alphas == (0, decision.considered) for rung in looks)
    assert decision.alpha in pair.history.choose.scores


def test_a_large_gain_is_confirmed_early_and_the_interval_is_that_of_its_look() -> None:
    decision = Pair(hill(1.0, 3.0)).search(SURFACE)
    assert decision.look is not None
    assert (decision.look.num_prompts, decision.look.is_last) == (128, False)
    assert decision.look.confidence == pytest.approx(0.998)
    assert "128 untouched prompts" in decision.reason


@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([0.8, 0.95, 0.999]))
def test_the_looks_together_spend_the_error(num_prompts: int, most: int, confidence: float) -> None:
    for method in ("surface", "ladder"):
        settings = Search(method=method, confirm_prompts=most, confidence=confidence)
        looks = looks_of(num_prompts, settings, guarded=True)
        assert sum(1 - look.confidence for look in looks) == pytest.approx(1 - confidence)
        assert [look.is_last for look in looks] == [False] * (len(looks) - 1) + [True]
        sizes = [look.num_prompts for look in looks]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(num_prompts, most)
    assert len(looks) == 1


def test_a_guard_has_a_thousand_prompts_unless_the_job_names_a_number() -> None:
    for method in ("surface", "ladder", "grid"):
        for named, most in (({}, 1000), ({"confirm_prompts": 300}, 300)):
            looks = looks_of(4000, Search.model_validate({"method": method, **named}), guarded=True)
            assert looks[-1].num_prompts == most
    assert looks_of(4000, Search(method="ladder"), guarded=False)[-1].num_prompts == 512


def test_without_a_gain_dpo_is_kept_and_the_reason_says_what_could_have_been_seen() -> None:
    decisions = [Pair(flat, seed=seed).search(SURFACE) for seed in range(4)]
    assert {decision.alpha for decision in decisions} == {0.0}
    assert any("no alpha gains more than" in decision.reason for decision in decisions)
    falling = Pair(lambda alpha: -alpha).search(SURFACE)
    assert falling.alpha == 0
    assert "which 1000 untouched prompts would confirm" in falling.reason


def test_every_alpha_that_was_tried_is_chosen_or_has_a_reason() -> None:
    curves: Sequence[Curve] = (
        hill(0.3),
        hill(5.0, 0.3),
        flat,
        lambda alpha: alpha,
        lambda alpha: -alpha,
        hill(0.04),
    )
    for curve in curves:
        pair = Pair(curve, seed=3)
        decision = pair.search(SURFACE)
        tried = set(pair.history.choose.scores) - {0.0}
        assert {rejected.alpha for rejected in decision.rejected} == tried - {decision.alpha}
        assert all(rejected.reason for rejected in decision.rejected)


def test_a_guardrail_ends_the_climb_and_bounds_the_curve() -> None:
    pair = Pair(lambda alpha: alpha, length=lambda alpha: 200 * (1 + alpha / 3))
    decision = pair.search(SURFACE)
    assert max(pair.history.choose.scores) == 3.2
    assert 0.8 <= decision.alpha <= 1.8
    assert any("413 tokens where dpo's have 200" in rejected.reason for rejected in decision.rejected)


def test_a_small_set_is_asked_again_at_other_alphas() -> None:
    pair = Pair(hill(1.0, 2.5), halves=(80, 80))
    decision = pair.search(SURFACE)
    rounds = [rung for rung in pair.asked if rung.stage.startswith("round")]
    assert rounds
    assert {(rung.start, rung.stop) for rung in rounds} == {(0, 80)}
    assert 0.5 < decision.alpha < 1.8


@pytest.mark.timeout(1200)
@hypothesis_settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 10), st.floats(0.3, 3), st.integers(0, 1000), st.data())
def test_a_killed_search_comes_to_the_same_decision_and_asks_nothing_twice(
    best: float, height: float, seed: int, data: st.DataObject
) -> None:
    whole = Pair(hill(best, height), seed=seed)
    wanted = whole.search(SURFACE)
    cut = data.draw(st.integers(0, len(whole.asked) - 1))
    killed = Pair(hill(best, height), seed=seed)
    for rung in whole.asked[:cut]:
        killed.evaluate(rung)
    # Of the rung in flight, some prompts of one alpha were stored.
    rung = whole.asked[cut]
    killed.evaluate(replace(rung, alphas=rung.alphas[:1], stop=rung.start + rung.num_prompts // 2))
    answers = killed.history.generations
    assert killed.search(SURFACE) == wanted
    assert killed.asked == whole.asked[cut:]
    assert killed.history.generations == whole.history.generations > answers
    # What the report evaluates later changes nothing either.
    killed.evaluate(Rung("choose", (-1.0,), 0, 64, "sft"))
    assert decide(killed.history, SURFACE) == wanted


def test_a_search_that_is_resumed_elsewhere_takes_the_alphas_that_were_asked(tmp_path: Path) -> None:
    """Another machine's linear algebra rounds an alpha otherwise; the rungs of before say what was asked."""
    here = Pair(hill(1.0), seed=4)
    here.search(SURFACE)
    at = next(number for number, rung in enumerate(here.asked) if rung.stage == "round 2")
    elsewhere = replace(here.asked[at], alphas=tuple(alpha * 1.01 for alpha in here.asked[at].alphas))
    log = RungLog(open_store(str(tmp_path)), "evaluation/searches/pair-id.rungs.json")
    assert log.read() == ()
    log.write([*here.asked[:at], elsewhere])
    log.write(here.asked[:at])  # a rerun writes again what it plays again
    resumed = Pair(hill(1.0), seed=4)
    resumed.history = replace(resumed.history, asked=log.read())
    for rung in (*here.asked[:at], elsewhere):
        resumed.evaluate(rung)
    following = next_rung(resumed.history, SURFACE)
    assert following is not None
    assert following.start == elsewhere.stop
    resumed.search(SURFACE)
    assert not set(here.asked[at].alphas[1:]) & set(resumed.history.choose.scores) - set(
        np.concatenate([rung.alphas for rung in resumed.asked])
    )
    open_store(str(tmp_path)).put("evaluation/searches/pair-id.rungs.json", b"[{")
    assert log.read() == ()
