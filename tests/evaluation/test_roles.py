"""The roles of reward models: in a job file, in a search's decision, and in what identifies a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from expo_ray.config import Job, Pair, RewardModel, Search
from expo_ray.config.fields import Role
from expo_ray.config.search import Method
from expo_ray.evaluation.check_job import CheckedJob
from expo_ray.evaluation.search.roles import Roles, prompts_needed, role_tests
from expo_ray.evaluation.statistics import student_tail
from expo_ray.extrapolation.plan import plan_pair
from tests.support.chat_models import save_chat_pair
from tests.support.scores import scores_of
from tests.support.searched_pairs import BOTH_GAIN, Curve, flat, hill
from tests.support.searched_pairs import Pair as SearchedPair

METHODS = get_args(Method)
GRID = tuple(0.1 * 2**step for step in range(7))


def settings_of(method: Method) -> Search:
    return Search(method=method, alphas=GRID, confirm_prompts=1000)


def roles_of(*models: dict[str, Any]) -> Roles:
    """The roles of a job with these reward models, named rm0 and so on."""
    named: list[dict[str, Any]] = [
        {"model": f"python:a:b{number}", "name": f"rm{number}", **model}
        for number, model in enumerate(models)
    ]
    return Roles.of(job_of(named).rewards, Search())


def job_of(rewards: list[dict[str, Any]]) -> Job:
    pairs = [{"name": "pair", "sft": "sft", "dpo": "dpo"}]
    return Job.model_validate({"output": "out", "pairs": pairs, "rewards": rewards})


def test_the_first_model_chooses_and_the_others_guard_unless_the_job_says_otherwise() -> None:
    models: list[dict[str, Any]] = [
        {"model": "a"},
        {"model": "b"},
        {"model": "c", "role": "confirm"},
        {"model": "d", "margin": 0.2},
    ]
    assert [model.role for model in job_of(models).rewards] == ["choose", "guard", "confirm", "guard"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"model": "a", "role": "guard"}], "a comes first and has `role: guard`"),
        (
            [{"model": "a"}, {"model": "b", "role": "choose"}],
            "b: only the first reward model has `role: choose`",
        ),
        ([{"model": "a"}, {"model": "b", "role": "confirm", "margin": 0.2}], "leave `margin` out"),
        ([{"model": "a"}, {"model": "b", "role": "veto"}], "'choose', 'joint', 'guard' or 'confirm'"),
        ([{"model": "a"}, {"model": "b", "margin": 0}], "greater than 0"),
    ],
)
def test_roles_that_do_not_fit_are_refused_with_a_remedy(models: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        job_of(models)
    assert message in str(refused.value)


@pytest.mark.parametrize("role", get_args(Role))
def test_a_role_is_tested_as_a_one_sided_t_test_would(role: Role) -> None:
    """Differences with a standard deviation of 2: which mean differences pass on 400 prompts?"""
    ids = [str(number) for number in range(400)]
    noise = np.random.default_rng(1).normal(size=400)
    noise = 2 * (noise - noise.mean()) / noise.std(ddof=1)
    roles = roles_of({}, {"role": role}) if role != "choose" else roles_of({})
    shift = -0.2 if role in ("guard", "joint") else 0.0
    for mean in (shift + 0.14, shift + 0.26):
        name = "rm0" if role == "choose" else "rm1"
        rewards = {"rm0": noise + 9, name: noise + mean}
        dpo = scores_of(0.0, ids, dict.fromkeys(rewards, np.zeros(400)))
        scores = scores_of(0.5, ids, rewards)
        (test,) = (
            test for test in role_tests("confirm", scores, dpo, roles, 0.95) if test.reward_model == name
        )
        expected = stats.ttest_1samp(noise + mean, shift, alternative="greater").pvalue < 0.025
        assert (test.passed, test.role) == (expected, role)
        assert test.limit == pytest.approx(shift)
        assert (test.p_value < 0.025) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_guard_lets_pass_what_a_confirming_model_refuses(method: Method) -> None:
    """The second model is indifferent up to alpha 2, and collapses beyond."""
    curves: tuple[Curve, Curve] = (hill(1.0, 1.5), lambda alpha: min(0.0, 8 - 4 * alpha))
    guarded = [SearchedPair(*curves, seed=seed).search(settings_of(method)) for seed in (1, 2)]
    refused = SearchedPair(*curves, seed=1, roles=BOTH_GAIN).search(settings_of(method))
    assert any(decision.alpha for decision in guarded)
    assert refused.alpha == 0
    chosen = next(decision for decision in guarded if decision.alpha)
    assert [(test.role, test.passed) for test in chosen.tests] == [("choose", True), ("guard", True)]
    assert "by rm1, not worse by more than" in chosen.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_guard_lets_no_harm_beyond_its_margin_pass(method: Method) -> None:
    """The second model loses 0.2 standard deviations of a paired difference (2.1) at every alpha."""
    for seed in range(2):
        pair = SearchedPair(hill(1.0, 2.0), lambda alpha: -0.42 if alpha else 0.0, seed=seed)
        assert pair.search(settings_of(method)).alpha == 0
    generous = roles_of({}, {"margin": 0.5})
    pair = SearchedPair(hill(1.0, 2.0), lambda alpha: -0.42 if alpha else 0.0, roles=generous)
    assert pair.search(settings_of(method)).alpha > 0


@pytest.mark.parametrize("method", METHODS)
def test_joint_models_choose_together_in_their_own_units(method: Method) -> None:
    """The first likes 2 best, the second, whose rewards are a hundred times as large, 0.5; both gain between them."""

    class Scaled(SearchedPair):
        def respond(self, half: Any, alpha: float, count: int) -> Any:
            scores = super().respond(half, alpha, count)
            scores.rewards["rm1"] *= 100
            return scores

    pair = Scaled(hill(2.0), hill(0.5), roles=roles_of({}, {"role": "joint"}))
    decision = pair.search(settings_of(method))
    # The slopes of both hills, 1 - a / 2 and 4 - 8 a, cancel at 0.59.
    assert 0.35 < decision.alpha < 1.05
    assert [test.reward_model for test in decision.tests] == ["rm0 + rm1", "rm0", "rm1"]
    assert [test.role for test in decision.tests] == ["choose", "joint", "joint"]
    assert {measured.reward_model for measured in pair.evidence(decision)} == {"rm0 + rm1", "rm0", "rm1"}


@pytest.mark.parametrize("method", METHODS)
def test_a_gain_may_be_asked_for_at_the_length_of_dpo(method: Method) -> None:
    """Beyond 0.6, more reward is more length and nothing else."""

    class Longer(SearchedPair):
        def respond(self, half: Any, alpha: float, count: int) -> Any:
            scores = super().respond(half, alpha, count)
            generator = np.random.default_rng([7, half == "choose", round((alpha + 1) * 1e6)])
            log_length = np.log(200) + 0.2 * max(alpha - 0.6, 0) + generator.normal(0, 0.3, count)
            rewards = {"rm0": scores.rewards["rm0"] + 5 * (log_length - np.log(200))}
            return replace(scores, rewards=rewards, lengths=np.exp(log_length))

    by_reward, controlled = (
        Longer(
            lambda alpha: 1.0 - abs(min(alpha, 0.6) / 0.6 - 1.0) - 0.2 * max(alpha - 0.6, 0.0), roles=roles
        )
        for roles in (Roles(), Roles(length_controlled=True))
    )
    settings = Search(method=method, alphas=GRID, confirm_prompts=1000)
    longer, as_long = by_reward.search(settings), controlled.search(settings)
    assert as_long.alpha < 1.3 < longer.considered
    assert as_long.tests[0].gain.mean == pytest.approx(1.0, abs=0.3)


def test_a_message_says_how_many_prompts_a_guard_needs() -> None:
    needed = prompts_needed(0.1, 0.95)
    assert needed == 785
    power = stats.norm.cdf(0.1 * np.sqrt(needed) - stats.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=0.002)
    pair = SearchedPair(hill(1.0, 2.0), flat, halves=(1000, 60))
    decision = pair.search(Search(method="ladder"))
    assert decision.alpha == 0
    assert "785 prompts show it in four of five cases" in decision.reason


def test_without_untouched_prompts_the_other_models_are_tested_as_well() -> None:
    pair = SearchedPair(hill(1.0, 3.0), flat, halves=(300, 0), roles=BOTH_GAIN)
    decision = pair.search(Search(method="ladder"))
    assert decision.alpha == 0
    assert "by rm1 is" in decision.reason or "rm1 has to confirm it" in decision.reason


def test_a_search_by_the_rule_of_before_keeps_its_id_and_another_rule_is_another_search(
    tmp_path: Path,
) -> None:
    sft, dpo = save_chat_pair(tmp_path / "pair", tied=False, dtype=torch.bfloat16)
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})

    def search_id(*others: dict[str, Any]) -> str:
        rewards = [
            {"model": "python:a:b"},
            *({"model": f"python:a:c{number}", **each} for number, each in enumerate(others)),
        ]
        return CheckedJob(job_of(rewards), [plan], []).search_id(plan)

    # No reward model is read here, so that all differences are those of roles.
    assert (
        search_id() == search_id({"role": "confirm"}) == search_id({"role": "confirm"}, {"role": "confirm"})
    )
    ids = [search_id(), *(search_id(each) for each in ({}, {"margin": 0.2}, {"role": "joint"}))]
    assert len(set(ids)) == len(ids)


def test_a_job_file_gives_its_models_their_roles() -> None:
    rewards = (
        RewardModel(model="a"),
        RewardModel(model="b", role="joint"),
        RewardModel(model="c", role="guard"),
    )
    roles = Roles.of(rewards, Search(prompts=(48, 96)))
    assert (roles.joint, roles.scaled_on) == (("a", "b"), 48)
    assert [roles.by_model[name].role for name in "abc"] == ["joint", "joint", "guard"]


@pytest.mark.parametrize("looks", [1, 4])
def test_the_p_value_of_a_confirmation_is_below_its_level_where_the_gain_is_confirmed(looks: int) -> None:
    method: Method = "ladder" if looks == 1 else "surface"
    for height, seed in ((1.0, 0), (0.35, 1), (0.0, 2)):
        decision = SearchedPair(hill(1.0, height), seed=seed).search(Search(method=method))
        assert (decision.p_value < 0.025) == (decision.alpha > 0)


@pytest.mark.parametrize(
    ("value", "freedom"), [(-3.0, 1), (-0.4, 7), (0.0, 30), (1.2, 2), (2.5, 511), (6.0, 40)]
)
def test_the_tail_of_t_is_that_of_scipy(value: float, freedom: int) -> None:
    assert student_tail(value, freedom) == pytest.approx(stats.t.sf(value, freedom), rel=1e-6, abs=1e-12)
