"""dpo against itself: drift of an engine or a reward model shows, and an engine that has changed is refused as a baseline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_ray.config import Job, Pair, Sampling, Search
from expo_ray.errors import EndpointError
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response, Reward, seed_of
from expo_ray.evaluation.responses.stored_responses import read_stored_responses
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.evaluation.search.alpha_scores import AlphaScores, AnsweredAgain
from expo_ray.evaluation.search.history import Rung
from expo_ray.evaluation.search.pair_evaluator import PairEvaluator, SharedScorer
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.evaluation.search.search_pair import halves_of, search_pair
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import DPO, Step
from expo_ray.progress import Progress
from expo_ray.report.results import OtherLooks
from expo_ray.storage import Store, open_store
from tests.support import fake_endpoint as endpoints
from tests.support.chat_models import save_chat_pair
from tests.support.fake_endpoint import Body, FakeEndpoint, fake_endpoint
from tests.support.scores import scores_of

PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(400)]
)
STEP = Step(0.5)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> PairPlan:
    sft, dpo = save_chat_pair(tmp_path_factory.mktemp("pair"), tied=True, dtype=torch.bfloat16)
    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})


# --- the row of the report


class Drifting:
    """An evaluator without a gain, whose dpo answers otherwise at the end: by `drift` standard deviations of a response."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        self.asked_again: tuple[str, ...] = ()
        self.num_responses = 0

    def expect(self, steps: Sequence[Step]) -> None:
        """Nothing is made ahead."""

    def responses(self, step: Step, prompt_ids: Collection[str]) -> Mapping[str, Response]:
        return {}

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        ids = [prompt.id for prompt in prompts.prompts]
        seeds = [[int(name, 16), round(1000 * (step.alpha + 1))] for name in ids]
        return scores_of(
            step.alpha, ids, {"rm": np.array([np.random.default_rng(s).normal() for s in seeds])}
        )

    def ask_dpo_again(self, prompts: PromptSet) -> AnsweredAgain:
        self.asked_again = tuple(prompt.id for prompt in prompts.prompts)
        before = self.evaluate(DPO, prompts)
        # A few answers differ, as batches of another size round otherwise; and all of them by the drift.
        few = np.where(
            np.arange(len(prompts)) % 8 == 3, np.random.default_rng(5).normal(size=len(prompts)), 0.0
        )
        again = scores_of(0.0, before.prompt_ids, {"rm": before.rewards["rm"] + few + self.drift})
        return AnsweredAgain(before, again, len(prompts), int((few == 0).sum()))


def test_dpo_is_asked_again_on_prompts_of_the_whole_search_and_a_drift_warns(plan: PairPlan) -> None:
    results = {}
    for drift in (0.0, 0.5):
        evaluator = Drifting(drift)
        results[drift] = search_pair(plan, PROMPTS, Search(method="surface"), evaluator, print, at_once=1)
        again = results[drift].asked_again
        assert again is not None
        assert (again.prompts, again.responses, again.same) == (32, 32, 28)
        assert again.changes["rm"].low <= drift <= again.changes["rm"].high
        assert len(set(evaluator.asked_again)) == 32
        asked = [prompt.id for prompt in halves_of(PROMPTS)["choose"].prompts]
        places = [asked.index(prompt_id) for prompt_id in evaluator.asked_again if prompt_id in asked]
        assert places[0] == 0  # the first and the last prompt that dpo answered are among them
        assert max(np.diff(places)) <= 10
    warned = [any("asked again" in text for text in results[drift].warnings) for drift in (0.0, 0.5)]
    assert warned == [False, True]


def test_looks_of_other_searches_of_the_pair_are_counted() -> None:
    store = open_store("memory://other-looks/out")
    choosing, confirming = (Rung(half, (0.0, 0.5), 0, 64, "r") for half in ("choose", "confirm"))
    searches = {
        "pair-0123456789abcdef": [choosing, confirming, confirming],
        "pair-1123456789abcdef": [choosing],
        "pair-2123456789abcdef": [choosing, confirming],
        "pair-two-3123456789abcdef": [choosing, confirming],  # another pair
    }
    logs = {name: RungLog(store, f"evaluation/searches/{name}.rungs.json") for name in searches}
    for name, rungs in searches.items():
        logs[name].write(rungs)
    counted = {name: log.other_looks() for name, log in logs.items()}
    assert counted == {
        "pair-0123456789abcdef": OtherLooks(searches=1, looks=1),
        "pair-1123456789abcdef": OtherLooks(searches=2, looks=3),
        "pair-2123456789abcdef": OtherLooks(searches=1, looks=2),
        "pair-two-3123456789abcdef": None,
    }


# --- what is asked and stored


class FirstDigits:
    """A reward model: the first digits of a response of the fake endpoint, which are hexadecimal."""

    name, id, about = "digits", "d1", {"by": "this test"}

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        return [RewardInput(row.prompt_id, row.sample, row.messages, row.text) for row in responses]

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        yield [each.scored(float(int(each.text[:4], 16)), "digits") for each in inputs]

    def close(self) -> None:
        """Nothing is loaded."""


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with fake_endpoint(f"pair@{DPO}", f"pair@{STEP}") as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def evaluator(
    plan: PairPlan, endpoint: FakeEndpoint, store: Store, search_id: str = "0" * 16
) -> PairEvaluator:
    return PairEvaluator(
        plan, endpoint.url, [SharedScorer(FirstDigits())], search_id=search_id, sampling=Sampling(samples=2), store=store,
        progress=Progress("search", quiet=True), slots=8, at_once=1,
    )  # fmt: skip


def seeded(endpoint: FakeEndpoint) -> list[Body]:
    """The chats that ask for an answer, not for log-probabilities."""
    return [body for body in endpoint.chats if "seed" in body]


def test_dpo_is_asked_again_with_the_same_seeds_apart_from_its_answers_and_once_a_search(
    plan: PairPlan, endpoint: FakeEndpoint, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = PROMPTS.first(6)
    first = evaluator(plan, endpoint, store)
    before = first.evaluate(DPO, few)
    same = first.ask_dpo_again(few)
    assert (same.responses, same.same) == (12, 12)
    assert same.again.rewards["digits"].tolist() == before.rewards["digits"].tolist()
    assert first.num_responses == 24
    asked = [(body["messages"][0]["content"], body["seed"]) for body in seeded(endpoint)]
    expected = [
        (prompt.messages[0]["content"], seed_of(Sampling(), prompt.id, sample))
        for prompt in few.prompts
        for sample in (0, 1)
    ]
    assert sorted(asked) == sorted(expected * 2)
    # A search that is resumed does not ask once more; another one does, and sees what the engine has become.
    evaluator(plan, endpoint, store).ask_dpo_again(few)
    assert len(seeded(endpoint)) == 24
    answer = endpoints.text_for
    monkeypatch.setattr(
        endpoints, "text_for", lambda body: answer({**body, "temperature": "of another engine"})
    )
    drifted = evaluator(plan, endpoint, store, "1" * 16).ask_dpo_again(few)
    assert len(seeded(endpoint)) == 36
    assert (drifted.responses, drifted.same) == (12, 0)
    assert drifted.before.rewards["digits"].tolist() == before.rewards["digits"].tolist()
    assert drifted.again.rewards["digits"].tolist() != before.rewards["digits"].tolist()
    # What is asked again is no answer to the job's questions.
    job = Job.model_validate(
        {"output": store.uri, "pairs": [{"name": "pair", "sft": "/s", "dpo": "/d", "alphas": [0]}], "sampling": {"samples": 2}}
    )  # fmt: skip
    (stored,) = read_stored_responses(store, job, [few])
    monkeypatch.undo()
    assert sorted(row.text for row in stored.responses) == sorted(map(answer, seeded(endpoint)[:12]))


@pytest.mark.parametrize("changed", [{"engine": "vllm 9.9"}, {"settings": "eager"}, {"dtype": "float16"}])
def test_answers_of_an_engine_that_has_changed_are_not_compared_with_those_of_before(
    changed: dict[str, str], plan: PairPlan, endpoint: FakeEndpoint, store: Store
) -> None:
    few = PROMPTS.first(6)
    search = evaluator(plan, endpoint, store)
    search.evaluate(DPO, few)
    for name in endpoint.cards:
        endpoint.cards[name] |= changed
    ((key, value),) = changed.items()
    with pytest.raises(
        EndpointError, match=f"the engine has changed since dpo was asked.*{key} was .* is {value}"
    ):
        search.evaluate(STEP, few)
    # As the remedy says: the next run asks dpo anew, in the same engine.
    asked = len(seeded(endpoint))
    again = evaluator(plan, endpoint, store)
    again.evaluate(DPO, few)
    again.evaluate(STEP, few)
    assert len(seeded(endpoint)) - asked >= 12
    models = [body["model"] for body in seeded(endpoint)]
    assert models.count(f"pair@{DPO}") == 24
