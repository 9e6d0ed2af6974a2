"""Multipliers of groups of tensors: their search over known rewards, and their weights against a pair that has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_ray.config import Group, Pair, Search
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.groups import GroupDecision, search_groups
from expo_ray.evaluation.search.search_pair import halves_of
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.step import DPO, Step, parse_step, stepped
from expo_ray.serving.weights import extrapolated
from tests.support.chat_models import save_chat_pair

PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(800)]
)
ALL: tuple[Group, ...] = ("attention", "mlp", "embeddings")
ALONE = Step(0.8)


class Truth:
    """True rewards of steps: dpo's is 0 and alpha's 1; `worth` is what a multiplier adds, `other` the same to a second model."""

    def __init__(self, worth: dict[str, float], *, other: float = 0.0, lengthens: str = "") -> None:
        self.worth, self.other, self.lengthens = worth, other, lengthens
        self.asked: list[tuple[Step, int]] = []

    def __call__(self, step: Step, prompts: PromptSet) -> AlphaScores:
        ids = tuple(prompt.id for prompt in prompts.prompts)
        self.asked.append((step, len(ids)))
        parts = [f"{group}={factor:g}" for group, factor in step.factors]
        true = (step.alpha > 0) + sum(self.worth.get(part, 0.0) for part in parts)
        seed = sum(map(ord, str(step)))
        noise = np.array([np.random.default_rng([int(one, 16), seed]).normal() for one in ids])
        ones = np.ones(len(ids))
        lengths = ones * (400 if self.lengthens in parts else 200)
        second = true + noise[::-1] if step == DPO or not step.factors else self.other + noise[::-1]
        return AlphaScores(
            step.alpha, ids, {"rm": true + noise, "second": second}, lengths, 0 * ones, 0 * ones, 0 * ones
        )


def search(truth: Truth, groups: tuple[Group, ...] = ALL, prompts: PromptSet = PROMPTS) -> GroupDecision:
    settings = Search(prompts=(128, 400), confirm_prompts=400, groups=groups)
    return search_groups(ALONE.alpha, prompts, settings, truth, lambda text: None, at_once=2)


def test_what_is_better_in_two_groups_is_found_and_confirmed_on_untouched_prompts() -> None:
    truth = Truth({"mlp=2": 0.8, "attention=0.5": 0.6, "attention=0": -1.0}, other=1.5)
    found = search(truth)
    assert str(found.step) == "0.8,attention=0.5,mlp=2", found.reason
    assert "untouched prompts" in found.reason
    confirm = {prompt.id for prompt in halves_of(PROMPTS)["confirm"].prompts}
    assert set(found.found["confirm"][found.step].prompt_ids) <= confirm
    fell = {str(one.step): one.fell for one in found.trials}
    assert len(fell) == 10  # three of each group, and two together
    assert not fell[str(found.step)]
    assert all(text for step, text in fell.items() if step != str(found.step))
    assert found.trials[0].num_prompts == 128


def test_where_no_group_is_better_alpha_stays_alone() -> None:
    truth = Truth({f"{group}={factor:g}": -0.5 for group in ALL for factor in (0, 0.5, 2)})
    found = search(truth)
    assert found.step == ALONE
    assert "alpha 0.8 in all groups: no group is better" in found.reason
    assert {count for _, count in truth.asked} == {128}


@pytest.mark.parametrize(
    ("truth", "why"),
    [
        (Truth({"mlp=2": 0.8}, other=-0.5), "second finds it worse than dpo"),
        (Truth({"mlp=2": 0.8}, other=1.0, lengthens="mlp=2"), "responses have 400 tokens"),
        (Truth({"mlp=2": 0.8}, other=0.0), "a lower bound is not above zero"),
    ],
)
def test_another_reward_model_and_the_guardrails_have_to_agree(truth: Truth, why: str) -> None:
    found = search(truth, ("mlp",))
    assert found.step == ALONE
    assert why in " ".join([found.reason, *(one.fell for one in found.trials)])


def test_without_untouched_prompts_the_bound_is_corrected_for_all_that_was_tried() -> None:
    few = replace(PROMPTS, prompts=PROMPTS.prompts[:40])
    truth = Truth({"mlp=2": 3.0}, other=3.0)
    found = search(truth, ("mlp",), few)
    assert found.step == Step(0.8, (("mlp", 2.0),)) or "lower bound" in found.reason


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
    found = stepped(plan_pair(pair, {}), step)
    written = {"attn": 0.0, r"layers\.0\.mlp": 0.25, r"layers\.[0-9]+\.mlp": 2.0}
    wanted = dict(extrapolated(plan_pair(pair.model_copy(update={"multipliers": written}), {}), 0.5))
    alone = dict(extrapolated(plan_pair(pair, {}), 0.5))
    weights = dict(extrapolated(found, step.alpha))
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, alone[name])}
    assert changed == {
        name for name in alone if "attn" in name or (".mlp." in name and ".layers.0." not in name)
    }
    as_published = plan_pair(pair.model_copy(update={"multipliers": step.multipliers(own)}), {})
    assert found.plan_id(0.5) == as_published.plan_id(0.5)
