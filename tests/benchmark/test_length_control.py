"""Win rates at equal length: the fit against other optimisers, and judges of whom the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from expo_ray.benchmark.alpaca_eval.covariates import load_covariates
from expo_ray.benchmark.alpaca_eval.length_control import (
    GamedRows,
    LengthControl,
    Regression,
    controlled_win_rate,
    rejudged_control,
)
from expo_ray.benchmark.alpaca_eval.win_rates import compare_arms, score_arm
from expo_ray.benchmark.head_to_head import head_to_head
from expo_ray.benchmark.judges.verdicts import Judgment, Verdicts, verdicts_of
from expo_ray.errors import BenchmarkError
from expo_ray.evaluation.statistics import Array
from tests.support.eval_data import read_jsonl_gz, real_data
from tests.support.judge_server import LIKING


def verdicts(wins: Array, lengths: Array, opponent: Array, model: str = "model") -> Verdicts:
    return Verdicts(model, "baseline", "judge", np.arange(len(wins), dtype=np.int64), wins, lengths, opponent)


def simulated(number: int = 120, seed: int = 0) -> tuple[Verdicts, Array, GamedRows]:
    """A model that is liked for its length as well; the difficulty of its prompts; and gamed rows."""
    generator = np.random.default_rng(seed)
    opponent, lengths = generator.integers(200, 3000, (2, number)).astype(np.float64)
    difficulty = generator.normal(0, 1, number)
    odds = -0.7 + difficulty + 0.001 * (lengths - opponent) + generator.normal(0, 1, number)
    gamed = GamedRows(
        generator.normal(0, 1.5, 2 * number), np.tile(difficulty, 2), generator.uniform(0, 1, 2 * number)
    )
    return verdicts(1 / (1 + np.exp(-odds)), lengths, opponent), difficulty, gamed


def fitted_by_scipy(arm: Verdicts, difficulty: Array, gamed: GamedRows, counts: Array) -> float:
    """The length-controlled win rate of one resample, by another optimiser on rows written out."""
    rows = np.repeat(np.arange(len(arm.wins)), counts.astype(int))
    delta = (arm.opponent_lengths - arm.lengths)[rows]
    own = np.stack([np.tanh(delta / delta.std(ddof=1)), difficulty[rows], np.ones(len(rows))], axis=1)
    shared = np.stack([np.tanh(gamed.delta), gamed.difficulty, np.zeros(len(gamed.delta))], axis=1)
    design, wins = np.concatenate([own, shared]), np.concatenate([arm.wins[rows], gamed.wins])
    weights = np.concatenate([np.ones(len(rows)), np.full(len(shared), 0.1)])

    def loss(coefficients: Array) -> float:
        odds = design @ coefficients
        return float(weights @ (np.logaddexp(0, odds) - wins * odds))

    best = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    return float(100 * np.mean(1 / (1 + np.exp(-(own[:, 1:] @ best[1:])))))


def test_every_resample_is_fitted_as_another_optimiser_fits_its_rows() -> None:
    arm, difficulty, gamed = simulated()
    generator = np.random.default_rng(1)
    counts = np.concatenate(
        [np.ones((1, 120)), generator.multinomial(120, np.full(120, 1 / 120), 40)]
    ).astype(np.float64)
    rates = controlled_win_rate(arm, LengthControl("rejudge", difficulty, gamed))(counts)
    wanted = [fitted_by_scipy(arm, difficulty, gamed, row) for row in counts]
    assert rates == pytest.approx(wanted, abs=2e-3)


def test_verdicts_that_are_all_the_same_have_a_finite_fit() -> None:
    arm, _, _ = simulated(40)
    for value, rate in ((1.0, 100), (0.0, 0), (0.5, 50)):
        same = verdicts(np.full(40, value), arm.lengths, arm.opponent_lengths)
        result = head_to_head(same)
        assert result.controlled.interval.mean == pytest.approx(rate, abs=0.1)
        assert result.win_rate.interval.mean == 100 * value
    assert head_to_head(verdicts(np.full(40, 0.5), arm.lengths, arm.opponent_lengths)).p_value == 1


def test_verdicts_that_length_alone_decides_have_a_finite_fit() -> None:
    lengths = np.arange(1, 41).astype(np.float64)
    result = head_to_head(verdicts((lengths > 20).astype(np.float64), lengths, np.full(40, 20.5)))
    assert result.controlled.interval.mean == pytest.approx(50, abs=2)


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    arm, _, _ = simulated()
    result = head_to_head(verdicts(arm.wins, arm.lengths, arm.lengths + 7))
    assert result.controlled.interval.mean == pytest.approx(result.win_rate.interval.mean, abs=1e-2)


def test_better_answers_that_are_longer_too_keep_their_lead() -> None:
    generator = np.random.default_rng(4)
    opponent = generator.integers(200, 2000, 805).astype(np.float64)
    lengths = np.round(opponent * np.exp(generator.normal(0.15, 0.3, 805)))
    spread = (lengths - opponent).std(ddof=1)
    odds = 0.4 + 0.8 * np.tanh((lengths - opponent) / spread)
    wins = generator.binomial(1, 1 / (1 + np.exp(-odds))).astype(np.float64)
    result = head_to_head(verdicts(wins, lengths, opponent))
    truth = 100 / (1 + np.exp(-0.4))
    assert result.controlled.interval.low < truth < result.controlled.interval.high
    assert result.win_rate.interval.mean > result.controlled.interval.mean
    assert result.p_value < 0.001


def real_pairs() -> tuple[dict[str, Array], list[tuple[str, str]], Array, list[Array]]:
    """Lengths of real outputs by model, the pairs of dpo and + ExPO, and lengths of the baseline and the gamed answers."""
    folder = real_data("alpaca")
    pytest.importorskip("pyarrow")
    import pandas as pd

    outputs = pd.read_parquet(folder / "expo_outputs.parquet").sort_values("index")
    lengths = {
        str(name): rows.output.map(len).to_numpy(np.float64) for name, rows in outputs.groupby("model")
    }
    partners = {
        name.removesuffix("-ExPO").removesuffix("_a25.0"): name
        for name in lengths
        if name.endswith(("ExPO", "a25.0"))
    }
    others = [
        np.array([len(row["output"]) for row in read_jsonl_gz(folder / f"{name}.jsonl.gz")], np.float64)
        for name in (
            "baseline_gpt4_1106_preview",
            "gamed_gpt4_1106_preview_concise",
            "gamed_gpt4_1106_preview_verbose",
        )
    ]
    return lengths, list(partners.items()), others[0], others[1:]


def test_an_indifferent_judge_finds_no_difference_on_real_lengths_and_official_length_control_does() -> None:
    lengths, pairs, baseline, gamed = real_pairs()
    covariates = load_covariates(str(real_data("alpaca")))
    half = np.full(len(baseline), 0.5)
    own = rejudged_control([verdicts(half, each, baseline) for each in gamed], covariates.difficulty)
    assert len(pairs) == 8
    everything = np.ones((1, len(baseline)))
    for dpo, expo in pairs:
        arms = [verdicts(half, lengths[name], baseline, name) for name in (dpo, expo)]
        change, official = (
            np.diff([controlled_win_rate(arm, control)(everything)[0] for arm in arms])[0]
            for control in (own, covariates.official)
        )
        assert change == pytest.approx(0, abs=0.3), expo
        assert official < -1, expo
        direct = head_to_head(verdicts(half, lengths[expo], lengths[dpo]))
        assert direct.controlled.interval.mean == pytest.approx(50, abs=0.3)


def test_a_judge_who_likes_length_is_set_right_on_real_lengths() -> None:
    lengths, pairs, baseline, gamed = real_pairs()
    covariates = load_covariates(str(real_data("alpaca")))

    def judged(name: Array, opponent: Array) -> Verdicts:
        return verdicts(1 / (1 + 2 ** ((opponent - name) / LIKING)), name, opponent)

    own = rejudged_control([judged(each, baseline) for each in gamed], covariates.difficulty)
    for dpo, expo in pairs:
        direct = head_to_head(judged(lengths[expo], lengths[dpo]))
        assert direct.win_rate.interval.mean > 51
        assert direct.controlled.interval.mean == pytest.approx(50, abs=1.5), expo
        rates = [controlled_win_rate(judged(lengths[name], baseline), own) for name in (dpo, expo)]
        change = np.diff([rate(np.ones((1, len(baseline))))[0] for rate in rates])[0]
        assert change == pytest.approx(0, abs=1), expo


def judgment(instruction: str, *, switched: bool, preference: float | None) -> Judgment:
    return Judgment("key", "judge", instruction, "dpo", "expo", 10, 20, switched, preference)


def test_both_orders_are_averaged_and_one_order_alone_does_not_count() -> None:
    rows = [
        judgment("b", switched=False, preference=2),
        judgment("b", switched=True, preference=1.5),
        judgment("a", switched=True, preference=1),
        judgment("a", switched=False, preference=None),
    ]
    averaged = verdicts_of(rows, ["a", "b", "c"])
    assert (averaged.model, averaged.opponent, averaged.index.tolist()) == ("expo", "dpo", [0, 1])
    assert np.isnan(averaged.wins[0])
    assert averaged.wins[1] == 0.75
    assert (averaged.unparsed, averaged.parsed.index.tolist()) == (1, [1])


@pytest.mark.parametrize("wrong", [{"judge": "other"}, {"model_2": "other"}, {"instruction": "z"}])
def test_judgments_that_do_not_belong_together_are_refused(wrong: dict[str, str]) -> None:
    rows = [judgment("a", switched=False, preference=2)]
    fields = {name: getattr(rows[0], name) for name in Judgment.__dataclass_fields__}
    with pytest.raises(BenchmarkError):
        verdicts_of([*rows, Judgment(**fields | {"instruction": "b"} | wrong)], ["a", "b"])


def test_arms_of_another_baseline_or_control_are_not_compared() -> None:
    arm, difficulty, gamed = simulated()
    control = LengthControl("rejudge", difficulty, gamed)
    raw, controlled = score_arm(arm, None), score_arm(arm, control)
    with pytest.raises(BenchmarkError, match="differ in baseline, judge or length control"):
        compare_arms(raw, controlled, control)


def test_arms_with_different_gaps_are_compared_on_the_prompts_they_share() -> None:
    arm, difficulty, gamed = simulated()
    control = LengthControl("rejudge", difficulty, gamed)
    wins = arm.wins.copy()
    wins[:10] = np.nan
    first = score_arm(verdicts(wins, arm.lengths, arm.opponent_lengths), control)
    second = score_arm(arm, control)
    result = compare_arms(first, second, control)
    assert result.prompts == 110
    assert first.unparsed == 10
    assert result.win_rate.interval.mean == 0
    assert result.controlled is not None
    assert result.controlled.interval.mean == 0


def test_a_regression_without_gamed_rows_ignores_what_its_difficulty_would_share() -> None:
    arm, difficulty, _ = simulated()
    counts = np.ones((1, 120))
    with_term = Regression(arm.lengths - arm.opponent_lengths, arm.wins, difficulty).coefficients(counts)
    without = Regression(arm.lengths - arm.opponent_lengths, arm.wins).coefficients(counts)
    assert (with_term.shape, without.shape) == ((1, 3), (1, 2))
