from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_ray.config import Guardrails
from expo_ray.config.guardrails import GUARDRAILS
from expo_ray.evaluation.records import Response, Reward
from expo_ray.evaluation.search.alpha_scores import AlphaScores, EvaluationError, alpha_scores
from expo_ray.evaluation.search.guardrails import bought_with_length, checks, rejection
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES, is_broken, repetition_of
from expo_ray.evaluation.statistics import Array
from expo_ray.report.results import GuardrailCheck
from tests.support.scores import scores_of

PROSE = (
    "The old lighthouse keeper counted ships all summer, and wrote each name into a book that nobody else was allowed to open. "
    "When winter came he read the names aloud to the cat, who seemed to remember some of them."
)


def response(
    prompt: str, sample: int = 0, text: str = PROSE, tokens: int = 50, end: str = "stop"
) -> Response:
    return Response(prompt, sample, "pair@0.5", [], text, tokens, 10, end, seed=1)


def keyed(rows: list[Response]) -> dict[tuple[str, int], Response]:
    return {row.key: row for row in rows}


def scored(rows: list[Response], reward: float = 1.0) -> dict[str, dict[tuple[str, int], Reward]]:
    return {"rm": {row.key: Reward(row.prompt_id, row.sample, reward) for row in rows}}


def flat(length: float = 100.0, measures: Mapping[str, Array] | None = None) -> AlphaScores:
    """100 prompts: 100 tokens each, nothing cut, repeated or broken."""
    return scores_of(0.5, list(map(str, range(100))), {"rm": np.zeros(100)}, length=length, measures=measures)


def share(value: float) -> Array:
    """A mean of `value` over 100 prompts."""
    return (np.arange(100) < round(100 * value)).astype(np.float64)


def find(name: str, scores: AlphaScores, dpo: AlphaScores) -> GuardrailCheck:
    return next(check for check in checks(scores, dpo, Guardrails(), 0.95) if check.name == name)


def test_samples_are_averaged_within_a_prompt_and_prompts_keep_the_order_of_the_set() -> None:
    rows = [
        response("b", 0, tokens=10),
        response("b", 1, tokens=30, end="length"),
        response("a", 0, text="", tokens=2),
        response("a", 1, tokens=4),
        response("elsewhere", 0),
    ]
    rewards = {
        "rm": {row.key: Reward(row.prompt_id, row.sample, row.num_tokens / 2) for row in rows},
        "other": {row.key: Reward(row.prompt_id, row.sample, 7.0) for row in rows},
    }
    scores = alpha_scores(0.5, ["b", "a"], keyed(rows), rewards)
    assert scores.prompt_ids == ("b", "a")
    assert list(scores.rewards) == ["rm", "other"]
    assert scores.rewards["rm"].tolist() == [10, 1.5]
    assert scores.lengths.tolist() == [20, 3]
    assert scores.measures["cut"].tolist() == [0.5, 0]
    assert scores.measures["broken"].tolist() == [0, 0.5]
    assert scores.samples == 2
    assert scores.on(scores.prompt_ids[:1]).rewards["rm"].tolist() == [10]


def test_rows_that_do_not_fit_are_named() -> None:
    rows = [response("a"), response("b")]
    with pytest.raises(EvaluationError, match=r"1 of 3 prompts .*\(c\)"):
        alpha_scores(0.5, ["a", "b", "c"], keyed(rows), scored(rows))
    with pytest.raises(EvaluationError, match=r"rm has not scored 1 of 2 responses \(b/0\)"):
        alpha_scores(0.5, ["a", "b"], keyed(rows), scored(rows[:1]))
    with pytest.raises(EvaluationError, match="no finite number"):
        alpha_scores(0.5, ["a", "b"], keyed(rows), scored(rows, float("nan")))
    with pytest.raises(EvaluationError, match="no rewards"):
        alpha_scores(0.5, ["a", "b"], keyed(rows), {})


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (PROSE, 0, 0.01),
        ("C" * 300, 0.99, 1),
        (PROSE + " again and again" * 30, 0.5, 0.8),
        (PROSE[:40] * 2, 0.3, 0.7),
        ("short", 0, 0),
        ("", 0, 0),
    ],
)
def test_repetition_sees_loops_with_and_without_spaces(text: str, low: float, high: float) -> None:
    assert low <= repetition_of(text) <= high


@given(st.text(max_size=80), st.integers(1, 4))
def test_repetition_is_a_share_and_grows_with_each_copy(text: str, copies: int) -> None:
    shares = [repetition_of(text * count) for count in range(1, copies + 2)]
    assert all(0 <= value < 1 for value in shares)
    if len(text) >= 16:
        assert shares == sorted(shares)


def test_empty_and_leaking_responses_are_broken() -> None:
    assert is_broken(response("a", text=" \n"), ())
    assert is_broken(response("a", text="Yes.<|im_start|>user"), ("<|im_start|>",))
    assert is_broken(dataclasses.replace(response("a"), num_special=1), ())
    assert not is_broken(response("a", text="Yes."), ("<|im_start|>",))


def test_each_guardrail_of_the_table_is_checked_against_its_limits() -> None:
    rows = [response("a"), response("b")]
    logprobs = {row.key: [-1.0] for row in rows}
    scores = alpha_scores(0.5, ["a", "b"], keyed(rows), scored(rows), logprobs=(logprobs, logprobs))
    by_name = {check.name: check for check in checks(scores, scores, Guardrails(), 0.95)}
    assert list(by_name) == list(GUARDRAILS)
    for name, check in by_name.items():
        limit = Guardrails().limit(name)
        assert (check.warn, check.limit, check.verdict) == (limit.warn, limit.reject, "ok")
    assert RESPONSE_MEASURES.keys() <= GUARDRAILS.keys()


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (100, "ok"),
        (129, "ok"),
        (131, "warn"),
        (161, "reject"),
        (78, "ok"),
        (76, "warn"),
        (62, "reject"),
        (0, "reject"),
    ],
)
def test_responses_may_neither_grow_nor_shrink_too_far(tokens: int, verdict: str) -> None:
    check = find("length ratio", flat(float(tokens)), flat())
    assert check.verdict == verdict
    assert check.value == pytest.approx(tokens / 100)
    assert f"{tokens} tokens where dpo's have 100" in check.text


@pytest.mark.parametrize(
    ("name", "before", "after", "verdict"),
    [
        ("cut", 0.0, 0.04, "ok"),
        ("cut", 0.0, 0.06, "warn"),
        ("cut", 0.0, 0.12, "reject"),
        ("cut", 0.3, 0.34, "ok"),
        ("cut", 0.3, 0.1, "ok"),
        ("repetition", 0.1, 0.3, "reject"),
        ("broken", 0.0, 0.02, "warn"),
        ("broken", 0.5, 0.56, "warn"),
        ("broken", 0.5, 0.6, "reject"),
    ],
)
def test_shares_may_rise_only_so_far_above_dpos(name: str, before: float, after: float, verdict: str) -> None:
    check = find(name, flat(measures={name: share(after)}), flat(measures={name: share(before)}))
    assert check.verdict == verdict
    assert check.value == pytest.approx(after - before)


def test_divergence_is_per_token_of_dpos_own_responses() -> None:
    rows = [response("a"), response("b")]
    dpo = {("a", 0): [-1.0, -1.0], ("b", 0): [-0.5] * 8}
    moved = {("a", 0): [-2.0, -3.0], ("b", 0): [-1.1] * 8}
    scores = alpha_scores(0.5, ["a", "b"], keyed(rows), scored(rows), logprobs=(dpo, moved))
    check = find("kl", scores, scores)
    assert check.value == pytest.approx((1 + 2 + 8 * 0.6) / 10)
    assert check.verdict == "warn"
    assert all(check.name != "kl" for check in checks(flat(), flat(), Guardrails(), 0.95))
    with pytest.raises(EvaluationError, match="1 log-probabilities and dpo 2"):
        alpha_scores(0.5, ["a"], keyed(rows), scored(rows), logprobs=(dpo, {("a", 0): [-2.0]}))


def test_another_reward_model_has_a_veto_where_it_finds_the_responses_worse() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 100)
    zero = np.zeros(100)

    def seen_by_second(shift: float) -> tuple[GuardrailCheck, ...]:
        scores = dataclasses.replace(flat(), rewards={"vader": zero + 5, "rm": noise + shift})
        return checks(
            scores, dataclasses.replace(flat(), rewards={"vader": zero, "rm": zero}), Guardrails(), 0.95
        )

    assert "rm finds it worse than dpo" in rejection(seen_by_second(-1.0))
    assert rejection(seen_by_second(0.0)) == ""
    assert rejection(seen_by_second(1.0)) == ""


@pytest.mark.parametrize(("prompts", "verdict"), [(40, "warn"), (400, "reject")])
def test_few_prompts_that_exceed_a_limit_by_chance_warn(prompts: int, verdict: str) -> None:
    """A rise of 12.5 points, or lengths x1.65 with a wide spread: on 40 prompts neither is certain to be above the limit that warns."""
    ids = [str(number) for number in range(prompts)]
    rewards = {"rm": np.zeros(prompts)}
    cut = (np.arange(prompts) % 8 == 0).astype(np.float64)
    spread = np.where(np.arange(prompts) % 8 == 0, 2300.0, 57.0)
    dpo = scores_of(0.0, ids, rewards)
    found = checks(scores_of(0.5, ids, rewards, measures={"cut": cut}), dpo, Guardrails(), 0.95)
    assert next(check.verdict for check in found if check.name == "cut") == verdict
    found = checks(scores_of(0.5, ids, rewards, length=spread), dpo, Guardrails(), 0.95)
    check = next(check for check in found if check.name == "length ratio")
    assert (check.verdict, round(check.value, 2)) == ("warn" if prompts == 40 else "reject", 1.69)


def test_where_dpo_itself_seldom_comes_to_an_end_more_cuts_warn() -> None:
    check = find("cut", flat(measures={"cut": share(0.99)}), flat(measures={"cut": share(0.82)}))
    assert check.verdict == "warn"
    assert "raise `sampling.max_tokens`" in check.text


@pytest.mark.parametrize(
    ("share_of_length", "longer", "gain", "verdict"),
    [
        (1.0, 1.3, 1.0, "reject"),  # all of it is length
        (0.0, 1.3, 1.0, "ok"),  # longer, and better for another reason
        (0.2, 1.3, 1.0, "ok"),
        (1.0, 1.02, 0.1, "ok"),  # as long as dpo's
        (0.0, 1.3, 0.05, "warn"),  # too small to be shown at dpo's length
    ],
)
def test_a_gain_that_is_bought_with_length_is_refused(
    share_of_length: float, longer: float, gain: float, verdict: str
) -> None:
    """Rewards rise with log length, within prompts as between alphas."""
    generator = np.random.default_rng(3)
    ids = [str(number) for number in range(500)]
    log_lengths = generator.normal(math.log(200), 0.3, (2, 500))
    log_lengths[1] += math.log(longer)
    slope = share_of_length * gain / math.log(longer)
    rewards = slope * log_lengths + generator.normal(0, 0.5, (2, 500)) + generator.normal(0, 2, 500)
    rewards[1] += (1 - share_of_length) * gain
    dpo, alpha = (
        scores_of(number, ids, {"rm": rewards[number]}, length=np.exp(log_lengths[number]))
        for number in (0, 1)
    )
    check = bought_with_length(alpha, dpo, Guardrails().bought)
    assert check.verdict == verdict, check.text
