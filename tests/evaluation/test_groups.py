"""Multipliers of groups of tensors: their search over known rewards, and their weights against a pair that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_ray.config import Group, Pair, Search
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.groups import StepScores, search_groups
from expo_ray.evaluation.search.roles import Criterion, Roles
from expo_ray.evaluation.search.search_pair import halves_of
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.step import DPO, Step, parse_step, stepped
from expo_ray.report.results import Groups
from expo_ray.serving.weights import extrapolated
from tests.support.chat_models import save_chat_pair
from tests.support.scores import scores_of

PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(800)]
)
ALL: tuple[Group, ...] = ("attention", "mlp", "embeddings")
ALONE = Step(0.8)


class Truth:
    """True rewards of steps: dpo's is 0 and alpha's 1; `worth` is what a multiplier adds, `other` the same to a second model."""

    texts: Mapping[Step, Mapping[str, Response]] = {}
    num_responses = 0

    def __init__(self, worth: dict[str, float], *, other: float = 0.0, lengthens: str = "") -> None:
        self.worth, self.other, self.lengthens = worth, other, lengthens
        self.asked: list[tuple[Step, tuple[str, ...]]] = []

    def expect(self, steps: Sequence[Step]) -> None:
        """Nothing is made ahead."""

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        ids = tuple(prompt.id for prompt in prompts.prompts)
        self.asked.append((step, ids))
        parts = [f"{group}={factor:g}" for group, factor in step.factors]
        true = (step.alpha > 0) + sum(self.worth.get(part, 0.0) for part in parts)
        seed = sum(map(ord, str(step)))
        noise = np.array([np.random.default_rng([int(name, 16), seed]).normal() for name in ids])
        second = true + noise[::-1] if step == DPO or not step.factors else self.other + noise[::-1]
        length = 400.0 if self.lengthens in parts else 200.0
        return scores_of(step.alpha, ids, {"rm": true + noise, "second": second}, length=length)


CONFIRMED = Roles({"second": Criterion("confirm")})


def search(
    truth: Truth, groups: tuple[Group, ...] = ALL, prompts: PromptSet = PROMPTS, roles: Roles = CONFIRMED
) -> tuple[Groups, StepScores]:
    settings = Search(prompts=(128, 400), confirm_prompts=400, groups=groups)
    return search_groups(ALONE.alpha, halves_of(prompts), settings, truth, print, at_once=2, roles=roles)


def test_a_model_that_guards_needs_no_gain_of_multipliers() -> None:
    chosen, _ = search(Truth({"mlp=2": 0.8}, other=0.1), ("mlp",), roles=Roles())
    assert chosen.multipliers == {"mlp": 2.0}


def test_what_is_better_in_two_groups_is_found_and_confirmed_on_untouched_prompts() -> None:
    truth = Truth({"mlp=2": 0.8, "attention=0.5": 0.6, "attention=0": -1.0}, other=1.5)
    chosen, scores = search(truth)
    assert chosen.multipliers == {"attention": 0.5, "mlp": 2.0}, chosen.reason
    assert "untouched prompts" in chosen.reason
    step = Step(0.8, (("attention", 0.5), ("mlp", 2.0)))
    assert scores.keys() >= {DPO, ALONE, step}
    confirm = {prompt.id for prompt in halves_of(PROMPTS)["confirm"].prompts}
    last = [ids for asked, ids in truth.asked if asked == step][-1]
    assert set(last) <= confirm
    assert [(measured.half, measured.reward_model) for measured in chosen.measured] == [
        (half, model) for half in ("choose", "confirm") for model in ("rm", "second")
    ]
    assert len(chosen.trials) == 10  # three of each group, and two together
    assert [trial.multipliers for trial in chosen.trials if not trial.reason] == [chosen.multipliers]
    assert chosen.trials[0].prompts == 128


def test_where_no_group_is_better_alpha_stays_alone() -> None:
    truth = Truth({f"{group}={factor:g}": -0.5 for group in ALL for factor in (0, 0.5, 2)})
    kept, scores = search(truth)
    assert kept.multipliers == {}
    assert "alpha 0.8 in all groups: no group is better" in kept.reason
    assert kept.measured == ()
    assert scores == {}
    assert {len(ids) for _, ids in truth.asked} == {128}


@pytest.mark.parametrize(
    ("truth", "why"),
    [
        (Truth({"mlp=2": 0.8}, other=-0.5), "second finds it worse than dpo"),
        (Truth({"mlp=2": 0.8}, other=1.0, lengthens="mlp=2"), "responses have 400 tokens"),
        (Truth({"mlp=2": 0.8}, other=0.0), "the lower bound over dpo is too low for second"),
    ],
)
def test_another_reward_model_and_the_guardrails_have_to_agree(truth: Truth, why: str) -> None:
    kept, _ = search(truth, ("mlp",))
    assert kept.multipliers == {}
    assert why in " ".join([kept.reason, *(trial.reason for trial in kept.trials)])


def test_without_untouched_prompts_the_bound_is_corrected_for_all_that_was_tried() -> None:
    few = replace(PROMPTS, prompts=PROMPTS.prompts[:40])
    truth = Truth({"mlp=2": 3.0}, other=3.0)
    groups, _ = search(truth, ("mlp",), few)
    assert groups.multipliers == {"mlp": 2.0} or "lower bound" in groups.reason


def test_a_step_reads_back_and_refuses_what_it_cannot_be() -> None:
    step = Step.of(0.8, {"mlp": 0.5, "attention": 2.0, "embeddings": 1.0})
    assert str(step) == "0.8,attention=2,mlp=0.5"
    assert parse_step("0.8,mlp=0.5,attention=2") == step
    assert parse_step("-0") == DPO
    for text in (
        "x",
        "0.5,",
        "0.5,mlp",
        "0.5,mlp=x",
        "0.5,mlp=-1",
        "0.5,norms=1",
        "0.5,mlp=1,mlp=2",
        "-1,mlp=2",
        "inf",
    ):
        with pytest.raises(ValueError, match=r"not|must|at least"):
            parse_step(text)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_step_are_those_of_a_pair_with_its_multipliers(tied: bool, tmp_path: Path) -> None:
    sft, dpo = save_chat_pair(tmp_path, tied=tied, dtype=torch.bfloat16)
    own = {r"layers\.0\.mlp": 0.25}
    pair = Pair(name="pair", sft=str(sft), dpo=str(dpo), multipliers=own)
    step = Step.of(0.5, {"attention": 0.0, "mlp": 2.0})
    plan = stepped(plan_pair(pair, {}), step)
    written = {"attn": 0.0, r"layers\.0\.mlp": 0.25, r"layers\.[0-9]+\.mlp": 2.0}
    wanted = dict(extrapolated(plan_pair(pair.model_copy(update={"multipliers": written}), {}), 0.5))
    alone = dict(extrapolated(plan_pair(pair, {}), 0.5))
    weights = dict(extrapolated(plan, step.alpha))
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, alone[name])}
    assert changed == {
        name for name in alone if "attn" in name or (".mlp." in name and ".layers.0." not in name)
    }
    as_published = plan_pair(pair.model_copy(update={"multipliers": step.multipliers(own)}), {})
    assert plan.plan_id(0.5) == as_published.plan_id(0.5)
