from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expo_ray.config import Search
from expo_ray.config.search import Method
from expo_ray.evaluation.search.alpha_scores import AlphaScores, EvaluationError
from expo_ray.evaluation.search.decision import Decision, decide
from expo_ray.evaluation.search.history import History, Rejected, Rung
from expo_ray.evaluation.search.ladder import top_of
from expo_ray.evaluation.search.methods import METHODS, SearchError, next_rung
from expo_ray.report.results import HalfName
from tests.support.searched_pairs import BOTH_GAIN, Curve, Pair, flat, hill

LADDER = Search(method="ladder")


def rejection(decision: Decision, alpha: float) -> Rejected:
    return next(rejected for rejected in decision.rejected if rejected.alpha == alpha)


@pytest.mark.parametrize("best", [0.15, 0.5, 2.0, 9.0])
def test_the_ladder_finds_the_top_of_a_hill(best: float) -> None:
    curve = hill(best)
    pair = Pair(curve)
    decision = pair.search(LADDER)
    assert curve(decision.alpha) > 0.8
    (confirmed,) = (measured for measured in pair.evidence(decision) if measured.half == "confirm")
    assert confirmed.prompts == 512
    assert confirmed.gain.low > 0
    assert pair.history.generations <= 6000


def test_the_ladder_asks_as_designed() -> None:
    pair = Pair(hill(1.0))
    pair.search(LADDER)
    first, *climb = [rung for rung in pair.asked if rung.stage == "ladder"]
    assert first.alphas == (0, 0.1, 0.2, 0.4)
    assert [rung.alphas for rung in climb] == [(0, 0.8), (0, 1.6), (0, 3.2)]
    assert {rung.num_prompts for rung in (first, *climb)} == {128}
    rest = pair.asked[len(climb) + 1 :]
    assert [rung.num_prompts for rung in rest] == [128, 256, 512, 1000, 512]
    assert [rung.half for rung in rest] == ["choose"] * 4 + ["confirm"]
    steps = np.log2(np.array(rest[0].alphas[1:]))
    assert np.diff(steps) == pytest.approx(0.5, abs=0.01)
    sizes = [len(rung.alphas) for rung in rest]
    assert sizes == sorted(sizes, reverse=True)
    assert all(0 in rung.alphas for rung in rest)


def test_no_gain_keeps_dpo_and_says_so() -> None:
    decision = Pair(lambda alpha: -alpha).search(LADDER)
    assert decision.alpha == 0
    assert decision.reason.startswith("keep dpo (alpha 0): ")
    assert {0.1, 0.2, 0.4} <= {rejected.alpha for rejected in decision.rejected}


def test_a_gain_that_untouched_prompts_do_not_confirm_is_none() -> None:
    class Overfitted(Pair):
        def respond(self, half: HalfName, alpha: float, count: int) -> AlphaScores:
            self.curves = (hill(1.0) if half == "choose" else flat,)
            return super().respond(half, alpha, count)

    decision = Overfitted(flat).search(LADDER)
    assert decision.considered > 0
    assert decision.alpha == 0
    assert "untouched prompts" in decision.reason
    assert rejection(decision, decision.considered).stage == "confirmation"


def test_a_climb_that_only_the_choosing_reward_likes_is_stopped_by_the_second_model() -> None:
    hacked = Pair(lambda alpha: alpha, lambda alpha: 0.1 * alpha - 0.1 * alpha**2, roles=BOTH_GAIN)
    decision = hacked.search(LADDER)
    tried = set(hacked.history.choose.scores)
    assert max(tried) < 12, "the climb goes on past what the second model finds worse"
    assert decision.alpha == 0
    assert "by rm1" in decision.reason
    assert any("rm1 finds it worse than dpo" in rejected.reason for rejected in decision.rejected)
    assert {(measured.half, measured.reward_model) for measured in hacked.evidence(decision)} == set(
        itertools.product(("choose", "confirm"), ("rm0", "rm1"))
    )


def test_where_another_model_would_rather_have_dpo_a_smaller_alpha_takes_the_place() -> None:
    """The first model likes alpha 1.3 best; the second one sees a small gain below 1, and a small loss above."""
    pair = Pair(hill(1.3), lambda alpha: 1.5 * alpha * (1 - alpha), seed=1, roles=BOTH_GAIN)
    decision = pair.search(Search(method="ladder", confirm_prompts=1000))
    assert decision.alpha == 0.8
    assert {
        measured.reward_model
        for measured in pair.evidence(decision)
        if measured.half == "confirm" and measured.gain.low > 0
    } == {"rm0", "rm1"}
    fell = rejection(decision, 1.13)
    assert (fell.stage, fell.reason[:41]) == (
        "final at 1000 prompts",
        "rm1 has to confirm it, and gives it 0.112",
    )


def test_a_guardrail_ends_the_climb_and_bounds_the_race() -> None:
    pair = Pair(lambda alpha: alpha, length=lambda alpha: 200 * (1 + alpha / 3))
    decision = pair.search(LADDER)
    # x1.6 is reached at alpha 1.8: the step at 3.2 trips, and nothing beyond is tried.
    assert max(pair.history.choose.scores) == 3.2
    assert 0.8 <= decision.alpha <= 1.8
    tripped = rejection(decision, 3.2)
    assert tripped.stage == "ladder"
    assert "413 tokens where dpo's have 200" in tripped.reason
    assert any("above x1.30" in warning for warning in decision.warnings)


def test_a_guardrail_that_trips_late_leaves_the_alphas_below_it() -> None:
    class Longer(Pair):
        """Past alpha 0.5, responses to the later prompts are three times as long: 128 prompts do not show it."""

        def respond(self, half: HalfName, alpha: float, count: int) -> AlphaScores:
            scores = super().respond(half, alpha, count)
            late = np.arange(count) >= 128
            return replace(scores, lengths=np.where(late & (alpha > 0.5), 3, 1) * scores.lengths)

    pair = Longer(hill(1.5))
    decision = pair.search(LADDER)
    assert decision.alpha in {0.4, 0.5}
    assert all("tokens where" in rejected.reason for rejected in decision.rejected if rejected.alpha == 0.8)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_guardrail_that_trips_on_untouched_prompts_gives_way_to_a_smaller_alpha(method: Method) -> None:
    class Longer(Pair):
        """Past alpha 0.7, responses to the untouched prompts are three times as long."""

        def respond(self, half: HalfName, alpha: float, count: int) -> AlphaScores:
            scores = super().respond(half, alpha, count)
            return replace(scores, lengths=(3 if half == "confirm" and alpha > 0.7 else 1) * scores.lengths)

    grid = (0.1, 0.3, 0.6, 1.0, 1.5)
    pair = Longer(hill(1.2, 2.0))
    decision = pair.search(Search(method=method, alphas=grid))
    assert 0.2 < decision.alpha < 0.7
    trials = list(dict.fromkeys(rung.alphas[1] for rung in pair.asked if rung.half == "confirm"))
    assert trials[0] > 0.7
    assert trials == sorted(trials, reverse=True)
    assert trials[-1] == decision.alpha == decision.considered
    for alpha in trials[:-1]:
        assert "tokens where dpo's have" in rejection(decision, alpha).reason
    assert {rejected.alpha for rejected in decision.rejected} == set(pair.history.choose.scores) - {
        0.0,
        decision.alpha,
    }


def test_no_smaller_alpha_is_tested_once_a_gain_was_not_confirmed() -> None:
    """The order of tests was set on the choosing half; each may be made only if the one before found a gain."""

    class Overfitted(Pair):
        def respond(self, half: HalfName, alpha: float, count: int) -> AlphaScores:
            self.curves = (hill(1.0) if half == "choose" or alpha < 0.5 else flat,)
            return replace(
                super().respond(half, alpha, count),
                lengths=np.full(count, 200.0 if half == "choose" or not alpha else 600.0),
            )

    pair = Overfitted(flat)
    decision = pair.search(LADDER)
    assert decision.alpha == 0
    assert len([rung for rung in pair.asked if rung.half == "confirm"]) == 1
    assert "untouched prompts" in decision.reason


def test_a_climb_without_end_says_so() -> None:
    decision = Pair(lambda alpha: alpha).search(Search(method="ladder", largest_alpha=1))
    assert decision.alpha <= 1
    assert any("raise `largest_alpha`" in warning for warning in decision.warnings)


def test_every_alpha_that_was_tried_is_chosen_or_has_a_reason() -> None:
    for curve in (hill(0.3), hill(5.0, 0.3), flat, lambda alpha: alpha):
        pair = Pair(curve, seed=3)
        decision = pair.search(LADDER)
        tried = set(pair.history.choose.scores) - {0.0}
        assert {rejected.alpha for rejected in decision.rejected} == tried - {decision.alpha}
        assert all(rejected.reason for rejected in decision.rejected)


@pytest.mark.timeout(1200)  # whole searches: two minutes on a machine that others keep busy
@hypothesis_settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.3, 3), st.integers(0, 1000), st.data())
def test_a_killed_search_comes_to_the_same_decision_and_asks_nothing_twice(
    best: float, height: float, seed: int, data: st.DataObject
) -> None:
    whole = Pair(hill(best, height), seed=seed)
    wanted = whole.search(LADDER)
    cut = data.draw(st.integers(0, len(whole.asked) - 1))
    killed = Pair(hill(best, height), seed=seed)
    for rung in whole.asked[:cut]:
        killed.evaluate(rung)
    # Of the rung in flight, one alpha was stored.
    killed.evaluate(replace(whole.asked[cut], alphas=whole.asked[cut].alphas[:1]))
    assert killed.search(LADDER) == wanted
    assert killed.asked in (whole.asked[cut:], whole.asked[cut + 1 :])
    # What the report evaluates later changes nothing either.
    killed.evaluate(Rung("choose", (-1.0,), 0, 128, "sft"))
    assert decide(killed.history, LADDER) == wanted


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    st.integers(16, 300),
    st.sampled_from([0, 10, 200]),
    st.sampled_from([(16,), (128,), (20, 40), (128, 256, 512, 1000)]),
    st.floats(0.1, 60),
    st.tuples(
        st.sampled_from([hill(0.05), hill(1.0), hill(10.0), flat]), st.sampled_from(["ladder", "surface"])
    ),
)
def test_any_set_and_any_settings_come_to_an_end(
    choose: int, confirm: int, prompts: tuple[int, ...], largest: float, searched: tuple[Curve, Method]
) -> None:
    curve, method = searched
    pair = Pair(curve, halves=(choose, confirm))
    decision = pair.search(Search(method=method, prompts=prompts, largest_alpha=largest))
    assert max(pair.history.choose.scores) <= max(largest, 0.4)
    assert len(pair.asked) < 20
    assert {rejected.alpha for rejected in decision.rejected} | {decision.alpha, 0.0} == set(
        pair.history.choose.scores
    ) | {0.0}


def test_every_method_that_a_job_file_may_name_is_there() -> None:
    assert METHODS.keys() == set(get_args(Method))


def test_the_grid_tries_the_list_and_never_chooses_an_interpolation() -> None:
    settings = Search(method="grid", alphas=(-0.5, 0.1, 0.3, 0.5))
    pair = Pair(lambda alpha: 1.0 if alpha < 0 else hill(0.3, 0.8)(alpha))
    decision = pair.search(settings)
    assert [(rung.half, rung.alphas, rung.num_prompts) for rung in pair.asked] == [
        ("choose", (-0.5, 0, 0.1, 0.3, 0.5), 1000),
        ("confirm", (0, 0.3), 512),
    ]
    assert decision.alpha == 0.3
    assert "interpolates" in rejection(decision, -0.5).reason


def test_the_grid_leaves_what_another_model_finds_no_better_than_dpo() -> None:
    settings = Search(method="grid", alphas=(0.5, 1.0, 1.4), prompts=(400,), confirm_prompts=1000)
    decision = Pair(hill(1.4), lambda alpha: 2 * alpha * (1.1 - alpha), seed=1, roles=BOTH_GAIN).search(
        settings
    )
    assert decision.alpha in {0.5, 1.0}
    assert "rm1" in rejection(decision, 1.4).reason


def test_without_untouched_prompts_the_bound_is_corrected_for_the_alphas_tried() -> None:
    """No gain anywhere, 12 alphas, nothing to confirm on: how often is one of them chosen?"""
    settings = Search(method="grid", alphas=tuple(range(1, 13)), prompts=(200,))
    decisions = [Pair(flat, halves=(200, 0), seed=seed).search(settings) for seed in range(100)]
    # The better half of a 95 % interval: at most 2.5 in 100 expected, 8 is beyond one in a thousand.
    assert sum(decision.alpha > 0 for decision in decisions) < 8
    assert any("corrected for the 12 alphas tried" in decision.reason for decision in decisions)


def test_a_decision_before_the_end_and_too_few_prompts_are_refused() -> None:
    pair = Pair(hill(1.0))
    pair.evaluate(Rung("choose", (0.0,), 0, 128, "ladder"))
    with pytest.raises(SearchError, match="not finished: ladder needs 4 alpha"):
        decide(pair.history, LADDER)
    with pytest.raises(SearchError, match="there are 15 prompts"):
        next_rung(Pair(flat, halves=(15, 15)).history, LADDER)


def test_alphas_on_other_prompts_are_not_compared() -> None:
    pair = Pair(hill(1.0))
    pair.evaluate(Rung("choose", (0.0, 0.1, 0.2, 0.4), 0, 128, "ladder"))
    known = pair.history.choose.scores
    foreign = replace(known[0.2], prompt_ids=tuple(f"other-{number}" for number in range(128)))
    with pytest.raises(
        EvaluationError,
        match=r"alpha 0\.2 was evaluated on 128 prompt\(s\) that are not of this half \(other-0,",
    ):
        pair.history.with_scores("choose", {0.2: foreign})
    other_model = replace(known[0.2], rewards={"another": known[0.2].rewards["rm0"]})
    with pytest.raises(EvaluationError, match=r"alpha 0\.2 was evaluated on other prompts or reward models"):
        next_rung(History(replace(pair.history.choose, scores={**known, 0.2: other_model})), LADDER)


@given(st.floats(0.05, 20), st.floats(0.1, 5), st.lists(st.integers(50, 1000), min_size=5, max_size=5))
def test_the_top_of_an_exact_parabola_in_log_alpha_is_found(
    best: float, height: float, weights: Sequence[int]
) -> None:
    alphas = [best * factor for factor in (0.5, 0.75, 1.1, 1.5, 2.0)]
    gains = [height * (1 - np.log(alpha / best) ** 2) for alpha in alphas]
    assert top_of(alphas, gains, weights) == pytest.approx(best, rel=0.06)
    assert top_of(alphas, [-gain for gain in gains], weights) is None
    assert top_of(alphas[:2], gains[:2], weights[:2]) is None
