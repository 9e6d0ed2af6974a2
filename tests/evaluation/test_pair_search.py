"""The course of a search over real statistics, with an evaluator that knows the true reward curve."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest

from expo_ray.config import Search
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.search.alpha_scores import AlphaScores, AnsweredAgain
from expo_ray.evaluation.search.rung_log import RungLog
from expo_ray.evaluation.search.search_pair import halves_of, search_alpha
from expo_ray.extrapolation.step import DPO, SFT, Step
from expo_ray.progress import Progress
from expo_ray.status_file import StatusFile
from expo_ray.storage import open_store
from tests.support.scores import scores_of

PROMPTS = PromptSet.of(
    "numbers", [prompt_of([{"role": "user", "content": f"Name number {i}."}]) for i in range(400)]
)


class Curve:
    """Rewards with a maximum at alpha 0.8; remembers what it was asked."""

    num_responses = 0

    def __init__(self, height: float) -> None:
        self.height = height
        self.asked: list[tuple[float, tuple[str, ...]]] = []
        self.expected: list[list[float]] = []

    def expect(self, steps: Sequence[Step]) -> None:
        self.expected.append([step.alpha for step in steps])

    def responses(self, step: Step, prompt_ids: Collection[str]) -> Mapping[str, Response]:
        return {}

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        alpha = step.alpha
        ids = tuple(prompt.id for prompt in prompts.prompts)
        self.asked.append((alpha, ids))
        true = self.height * (1 - (math.log2((alpha + 0.1) / 0.9)) ** 2 / 9) if alpha >= 0 else -1.0
        noise = [np.random.default_rng([int(name, 16), round(1000 * (alpha + 1))]).normal() for name in ids]
        shared = [np.random.default_rng(int(name, 16)).normal() for name in ids]
        return scores_of(alpha, ids, {"rm": true + np.array(noise) + np.array(shared)})

    def ask_dpo_again(self, prompts: PromptSet) -> AnsweredAgain:
        scores = self.evaluate(DPO, prompts)
        return AnsweredAgain(scores, scores, len(prompts), len(prompts))


def test_a_gain_is_found_and_confirmed_on_prompts_that_did_not_choose_it() -> None:
    settings = Search(method="ladder", prompts=(64, 128, 200))
    history, decision = search_alpha(halves_of(PROMPTS), settings, Curve(height=3.0), print, at_once=2)
    assert 0.3 <= decision.alpha <= 1.6, decision.reason
    choose, confirm = ({prompt.id for prompt in half.prompts} for half in PROMPTS.halves())
    assert not choose & confirm
    assert set(history.choose.scores[decision.alpha].prompt_ids) <= choose
    assert set(history.confirm.scores[decision.alpha].prompt_ids) <= confirm
    assert SFT.alpha in history.choose.scores
    (_, confirmed) = history.measurements([decision.alpha], settings.confidence)
    assert confirmed.half == "confirm"
    assert confirmed.gain.low > 0


def test_without_a_gain_dpo_is_kept() -> None:
    lines: list[str] = []
    _, decision = search_alpha(
        halves_of(PROMPTS),
        Search(method="ladder", prompts=(64, 128, 200)),
        Curve(height=0.0),
        lines.append,
        at_once=2,
    )
    assert decision.alpha == 0
    assert lines[-1] == decision.reason
    assert lines[0] == "ladder, alpha 0, 0.1, 0.2, 0.4 on 64 prompts"
    assert "keep dpo" in decision.reason


def test_a_rung_asks_only_for_alphas_that_need_more_prompts_and_each_set_begins_with_the_last_one() -> None:
    curve = Curve(height=3.0)
    search_alpha(halves_of(PROMPTS), Search(method="ladder", prompts=(64, 128, 200)), curve, print, at_once=1)
    for alpha in {alpha for alpha, _ in curve.asked}:
        sets = [ids for asked, ids in curve.asked if asked == alpha and ids]
        on_choose = [ids for ids in sets if ids[0] == sets[0][0]]
        assert [len(ids) for ids in on_choose] == sorted({len(ids) for ids in on_choose})
        for smaller, larger in pairwise(on_choose):
            assert larger[: len(smaller)] == smaller


def test_the_status_of_a_search_tells_what_each_pair_is_at() -> None:
    store = open_store("memory://status-of-a-search")
    with StatusFile(store) as status_file, Progress("search", status_file, rows="responses") as progress:
        progress.note("first", "ladder, alpha 0, 0.1 on 64 prompts")
        progress.expect(rows=128, kept=64)
        progress.add(rows=32, tokens=300)
        progress.rewards.expect(rows=32)
        progress.rewards.add(rows=16)
        assert progress.line.startswith("32/128 responses")
        assert progress.line.endswith("16/32 rewards")
        progress.note("second", "keep dpo")
        progress.finish()
    status = json.loads(store.read("status.json"))
    assert (status["state"], status["stage"], status["tokens"]) == ("done", "search", 300)
    assert status["responses"] == {"done": 32, "all": 128, "kept": 64}
    assert status["rewards"] == {"done": 16, "all": 32}
    assert status["pairs"] == {"first": "ladder, alpha 0, 0.1 on 64 prompts", "second": "keep dpo"}
    assert status["seconds_left"] is not None


def test_the_order_of_each_rung_is_known_ahead_and_the_first_alpha_of_most_next_ones() -> None:
    curve = Curve(height=3.0)
    search_alpha(halves_of(PROMPTS), Search(method="ladder", prompts=(64, 128, 200)), curve, print, at_once=1)
    asked = [alpha for alpha, _ in curve.asked]
    expected = [alpha for *alphas, _ in curve.expected for alpha in alphas]
    assert asked == [*expected, SFT.alpha]
    firsts = [alphas[0] for alphas in curve.expected[1:]] + [SFT.alpha]
    guessed = [then for *_, then in curve.expected]
    assert sum(map(float.__eq__, guessed, firsts)) >= len(firsts) - 1  # the climb ends somewhere


class Killed(Exception):
    """The search ends here, as by a signal."""


class Storing(Curve):
    """Answers each prompt at each alpha once, as the store keeps them, and counts the answers; dies after some of them."""

    def __init__(self, height: float, lives: int = 10**9) -> None:
        super().__init__(height)
        self.answers: set[tuple[float, str]] = set()
        self.lives = lives

    def evaluate(self, step: Step, prompts: PromptSet) -> AlphaScores:
        for prompt in prompts.prompts:
            if (step.alpha, prompt.id) not in self.answers:
                if len(self.answers) >= self.lives:
                    raise Killed
                self.answers.add((step.alpha, prompt.id))
        return super().evaluate(step, prompts)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_search_by_surface_goes_on_from_its_answers_and_its_rungs(share: float) -> None:
    settings = Search(method="surface", prompts=(32, 64, 128, 200))
    halves = halves_of(PROMPTS)
    whole = Storing(2.0)
    history, wanted = search_alpha(halves, settings, whole, print, at_once=2)
    log = RungLog(open_store(f"memory://killed-after-{share}"), "rungs.json")
    killed = Storing(2.0, lives=int(share * len(whole.answers)))
    with pytest.raises(Killed):
        search_alpha(halves, settings, killed, print, at_once=2, rung_log=log)
    assert log.read()
    killed.lives = 10**9
    resumed, decision = search_alpha(halves, settings, killed, print, at_once=2, rung_log=log)
    assert decision == wanted
    assert killed.answers == whole.answers
    assert len(killed.answers) == resumed.generations == history.generations
