"""A searched pair as `results.json` holds it: the same keys and values as in a file that older code wrote (`tests/data`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_ray.config import Guardrails, Limit, Pair, Search
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.search.alpha_scores import AlphaScores, AnsweredAgain, alpha_scores
from expo_ray.evaluation.search.roles import Criterion, Roles
from expo_ray.evaluation.search.search_pair import search_pair
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import Step
from expo_ray.report.results import Results
from expo_ray.report.results_file import parse_results, results_json
from tests.support.chat_models import save_chat_pair
from tests.support.paths import DATA

STORED = DATA / "searched_pairs.json"
PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(280)]
)
# Of 32 prompts, 7 that exceed `reject` end a climb only if they are certain to exceed `warn`: when the file was written, they did at 0.05.
WARN_THEN, WARN = 0.05, 0.03
SETTINGS = Search(
    method="ladder",
    prompts=(32, 64, 128),
    confirm_prompts=100,
    guardrails=Guardrails(cut=Limit(warn=WARN, reject=0.1)),
)
# As it was when the file was written: every model has to see a gain.
ROLES = Roles({"second": Criterion("confirm")})
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
BOUNDS = re.compile(r"\[[^\]]*\]")


class Answers:
    """An evaluator that knows the reward curve, a parabola in log alpha with this height at 0.8."""

    def __init__(self, height: float) -> None:
        self.height = height
        self._answers: dict[Step, dict[str, Response]] = {}
        self.num_responses = 0

    def expect(self, steps: Sequence[Step]) -> None:
        """Nothing is made ahead."""

    def responses(self, step: Step, prompt_ids: Collection[str]) -> Mapping[str, Response]:
        answered = self._answers.get(step, {})
        return {prompt_id: answered[prompt_id] for prompt_id in prompt_ids if prompt_id in answered}

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        alpha = step.alpha
        gain = self.height * (1 - math.log2((alpha + 0.1) / 0.9) ** 2 / 9) if alpha >= 0 else -1.0
        responses, rewards = {}, dict[str, dict[tuple[str, int], Reward]](first={}, second={})
        for prompt in prompts.prompts:
            seed = [int(prompt.id, 16), round(1000 * (alpha + 1)), 0]
            noise = np.random.default_rng(seed).normal(size=3)
            shared = np.random.default_rng(int(prompt.id, 16)).normal()
            length = max(1, round(40 + 10 * alpha + 4 * noise[2]))
            copies = 0 if noise[2] > 2.4 else 1 + int(alpha > 0 and noise[2] > 1.5)
            response = Response(
                prompt.id, 0, f"pair@{step}", prompt.messages, f"Number {prompt.id[:6]} at {step}. " * copies,
                length, 9, "length" if length > 50 else "stop", 1,
            )  # fmt: skip
            responses[response.key] = response
            for model, share, own in (("first", 1.0, noise[0]), ("second", 0.6, noise[1])):
                rewards[model][response.key] = Reward(prompt.id, 0, float(share * gain + shared + own))
        by_dpo = {key: [-1.0, -0.5] for key in list(responses)[:8]}
        by_alpha = {key: [-1.0 - 0.1 * alpha, -0.5 - 0.2 * alpha] for key in by_dpo}
        self._answers.setdefault(step, {}).update({row.prompt_id: row for row in responses.values()})
        self.num_responses += len(responses)
        return alpha_scores(
            alpha, [prompt.id for prompt in prompts.prompts], responses, rewards, special_tokens=["</s>"],
            logprobs=(by_dpo, by_alpha) if alpha >= 0 else None,
        )  # fmt: skip

    def ask_dpo_again(self, prompts: PromptSet) -> AnsweredAgain:
        scores = self.evaluate(Step(0.0), prompts)
        self.num_responses -= len(prompts)  # as the file was written, dpo was not asked again
        return AnsweredAgain(scores, scores, len(prompts), len(prompts))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> PairPlan:
    sft, dpo = save_chat_pair(tmp_path_factory.mktemp("pair"), tied=True, dtype=torch.bfloat16)
    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})


def parents_as_stored(plan: PairPlan, name: str) -> PairPlan:
    """The plan with the names that the stored pairs have."""
    return replace(
        plan,
        name=name,
        sft=replace(plan.sft, uri="hf://labs/sft", revision="abc"),
        dpo=replace(plan.dpo, uri="s3://bucket/dpo", revision=""),
    )


def differences(new: Any, old: Any, where: str = "") -> list[str]:
    """Compare two values read from JSON: keys and their order, numbers to a thousandth, and the numbers in sentences, which may be reworded.

    Intervals have become wider since the file was written.
    """
    if type(new) is not type(old) or (isinstance(new, dict) and list(new) != list(old)):
        return [f"{where}: {new!r} where {old!r} was"]
    if isinstance(new, dict):
        return [text for key in new for text in differences(new[key], old[key], f"{where}.{key}")]
    if isinstance(new, list):
        if len(new) != len(old):
            return [f"{where}: {len(new)} entries where {len(old)} were"]
        return [
            text for at, pair in enumerate(zip(new, old, strict=True)) for text in differences(*pair, f"{where}[{at}]")
        ]  # fmt: skip
    if isinstance(new, str):
        new, old = ([float(number) for number in NUMBER.findall(BOUNDS.sub("", text))] for text in (new, old))
    if where.endswith((".low", ".high")):
        beyond = old - new if where.endswith(".low") else new - old
        same = -2e-3 <= beyond < 0.5
    else:
        same = new == pytest.approx(old, abs=2e-3)
    return [] if same else [f"{where}: {new!r} where {old!r} was"]


@pytest.mark.parametrize(
    ("name", "height"), [("better", 2.0), ("no better", 0.0)], ids=["gain", "without a gain"]
)
def test_a_searched_pair_is_stored_as_before(name: str, height: float, plan: PairPlan) -> None:
    evaluator = Answers(height)
    result = search_pair(
        parents_as_stored(plan, name), PROMPTS, SETTINGS, evaluator, print, at_once=1, roles=ROLES
    )
    text = results_json(Results("s3://bucket/run", "2026-11-27T00:00:00Z", (result,))).decode()
    text = text.replace(f"above {WARN:+.1%}", f"above {WARN_THEN:+.1%}").replace(
        f"limit {WARN:+.1%}", f"limit {WARN_THEN:+.1%}"
    )
    written = json.loads(text.replace(f'"warn": {WARN}', f'"warn": {WARN_THEN}'))
    (stored,) = (pair for pair in json.loads(STORED.read_bytes())["pairs"] if pair["name"] == name)
    warnings = written["pairs"][0]["warnings"]
    written["pairs"][0]["warnings"] = [text for text in warnings if "at the token limit" not in text]
    # Older code did not store these.
    for key in ("tests", "asked_again", "grid_generations", *(["looks"] if name == "better" else [])):
        assert written["pairs"][0].pop(key)
    assert (written["pairs"][0].pop("p_value") < 0.025) == (name == "better")
    if name == "better":  # older code went on to search multipliers of the chosen alpha
        for key in ("groups", "examples", "generations"):
            del written["pairs"][0][key], stored[key]
    assert differences(written["pairs"][0], stored) == []


def test_stored_pairs_are_read_and_written_byte_for_byte() -> None:
    data = Path(STORED).read_bytes()
    assert results_json(parse_results(data)) == data
