"""Steps with multipliers of groups of tensors, as an endpoint serves them: their texts, and their weights against a pair that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expo_ray.config import Pair
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.step import DPO, Step, parse_step, stepped
from expo_ray.serving.weights import extrapolated
from tests.support.chat_models import save_chat_pair


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
