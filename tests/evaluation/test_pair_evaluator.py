"""A pair behind an endpoint, as the search asks for it: numbers in memory, texts in the store."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_ray.config import Pair, Sampling
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.evaluation.search.pair_evaluator import PairEvaluator, SharedScorer
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.step import DPO, Step
from expo_ray.progress import Progress
from expo_ray.storage import Store, open_store
from tests.support.chat_models import save_chat_pair
from tests.support.fake_endpoint import fake_endpoint, text_for

PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(150)]
)


class Lengths:
    """A reward model of whose scores only their number matters."""

    name, id = "lengths", "1"
    about: Mapping[str, Any] = {}

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        return [
            RewardInput(response.prompt_id, response.sample, response.messages, response.text)
            for response in responses
        ]

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        yield [asked.scored(float(len(asked.text)), "lengths") for asked in inputs]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    save_chat_pair(path, tied=True, dtype=torch.bfloat16)
    return path


def evaluator_of(folder: Path, store: Store, url: str) -> PairEvaluator:
    plan = plan_pair(Pair(name="pair", sft=str(folder / "sft"), dpo=str(folder / "dpo")), {})
    return PairEvaluator(
        plan, url, [SharedScorer(Lengths())], search_id="s", sampling=Sampling(), store=store, progress=Progress("search", rows="responses"),
        slots=16, at_once=1,
    )  # fmt: skip


def test_texts_lie_in_the_store_and_are_read_back(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with fake_endpoint("pair@0", "pair@0.5") as endpoint:
        evaluator = evaluator_of(folder, store, endpoint.url)
        for step in (DPO, Step(0.5)):
            scores = evaluator.evaluate(step, PROMPTS.first(100))
            assert len(scores.prompt_ids) == 100
        gc.collect()
        held = [value for value in gc.get_objects() if type(value) is Response]
        assert held == []
        assert evaluator.num_responses == 200
        ids = [prompt.id for prompt in PROMPTS.prompts[98:103]]
        read = evaluator.responses(Step(0.5), ids)
        chats = {
            body["messages"][0]["content"]: body for body in endpoint.chats if body["model"] == "pair@0.5"
        }
    assert set(read) == set(ids[:2])  # the others were not asked
    for prompt in PROMPTS.prompts[98:100]:
        assert read[prompt.id].text == text_for(chats[prompt.messages[0]["content"]])


def test_what_another_job_has_stored_is_not_taken_for_evaluated(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with fake_endpoint("pair@0") as endpoint:
        evaluator_of(folder, store, endpoint.url).evaluate(DPO, PROMPTS)
        later = evaluator_of(folder, store, endpoint.url)
        later.evaluate(DPO, PROMPTS.first(20))
        assert len(endpoint.chats) == 150 + 32  # 32 to measure likelihoods; nothing was asked twice
    assert later.num_responses == 20
    read = later.responses(DPO, [prompt.id for prompt in PROMPTS.prompts])
    assert set(read) == {prompt.id for prompt in PROMPTS.prompts[:20]}
