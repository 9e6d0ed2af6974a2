"""What the report shows of the evidence for an alpha: roles, and what they found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from expo_ray.report.formatting import signed
from expo_ray.report.page_tables import chance_rows, course_rows, evidence_rows, false_discovery_rates
from expo_ray.report.report_page import page_of
from expo_ray.report.results import AskedAgain, FittedGain, Interval, LooksTaken, OtherLooks, RoleTest
from expo_ray.report.results_file import parse_results, results_json
from tests.support.sample_results import MODELS, sample_results


def test_each_reward_model_has_its_role_and_its_test_in_the_report() -> None:
    results = sample_results()
    chosen = next(pair for pair in results.pairs if pair.name == "zephyr-7b")
    bound = Interval(-0.02, -0.07, 0.03)
    tests = (
        RoleTest(MODELS[0], "choose", "confirm", 1000, bound, limit=0.0, margin=None, passed=False),
        RoleTest(MODELS[1], "guard", "confirm", 1000, bound, limit=-0.21, margin=0.1, passed=True),
    )
    pair = replace(chosen, tests=tests)
    shown_page = page_of(replace(results, pairs=(pair,)))
    rows = evidence_rows(pair)
    (deciding,) = (
        measured
        for measured in pair.chosen
        if (measured.half, measured.reward_model) == ("confirm", MODELS[0])
    )
    visible = 1.43 * (deciding.gain.mean - deciding.gain.low)
    assert [(row.role, row.verdict) for row in rows if row.half == "confirming"] == [
        ("chooses: a gain", f"no gain beyond chance; {signed(visible)} would show in four of five cases"),
        ("guards: no loss beyond 0.210 (0.1 sd)", "no such loss"),
    ]
    for row in rows:
        assert row.role in shown_page
        assert row.verdict in shown_page
    written = results_json(replace(results, pairs=(pair,)))
    assert parse_results(written).pairs[0].tests == tests
    # Without tests, a file is as older versions wrote it.
    assert b'"tests"' in written
    assert b'"tests"' not in results_json(results)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_q_values_are_those_of_benjamini_and_hochberg(p_values: list[float]) -> None:
    p_values.sort()
    expected = stats.false_discovery_control(p_values, method="bh")
    assert false_discovery_rates(p_values) == pytest.approx(expected.tolist())


def test_a_run_over_several_pairs_shows_what_chance_may_have_chosen() -> None:
    results = sample_results()
    assert chance_rows(results) == []  # as in files of older versions
    values = dict(zip((pair.name for pair in results.pairs), (1.0, 0.02, 1e-7), strict=True))
    pairs = tuple(replace(pair, p_value=values[pair.name]) for pair in results.pairs)
    rows = chance_rows(replace(results, pairs=pairs))
    assert [(row.p_value, row.q_value) for row in rows] == [("1e-07", "3e-07"), ("0.02", "0.03"), ("1", "1")]
    page = page_of(replace(results, pairs=pairs))
    assert "Benjamini and Hochberg" in page
    assert "Benjamini and Hochberg" not in page_of(results)


def test_the_course_of_a_search_is_in_the_report() -> None:
    results = sample_results()
    change = {MODELS[0]: Interval(0.21, 0.08, 0.33), MODELS[1]: Interval(0.001, -0.02, 0.02)}
    pair = replace(
        next(pair for pair in results.pairs if pair.name == "zephyr-7b"),
        p_value=0.002,
        looks=(
            LooksTaken(0.8, 3, 512, 1000, "passed"),
            LooksTaken(0.4, 1, 128, 1000, "futile"),
            LooksTaken(0.2, 4, 1000, 1000, "last"),
        ),
        other_looks=OtherLooks(searches=2, looks=5),
        asked_again=AskedAgain(32, 64, 41, change, 0.99),
        fitted=tuple(
            FittedGain(alpha, Interval(alpha / 9, alpha / 9 - 0.1, alpha / 9 + 0.1))
            for alpha in (0.1, 0.4, 1.6)
        ),
        grid_generations=27_000,
    )
    course = dict(course_rows(pair))
    confirmations = [text for name, text in course_rows(pair) if name == "confirmation"]
    assert [text.split(" ")[1] for text in confirmations] == ["0.8", "0.4", "0.2"]
    assert "passed on 512 untouched prompts, at look 3; up to 1\u202f000 might" in confirmations[0]
    assert "given up on 128 untouched prompts, at look 1" in confirmations[1]
    assert "did not pass on all 1\u202f000 untouched prompts, at look 4" in confirmations[2]
    assert "2 other searches of this pair looked 5 times" in course["other searches"]
    assert "p is at most 0.006" in course["other searches"]  # 3 times 0.002
    assert course["responses"].endswith("would have taken 27\u202f000")
    again = [row for row in evidence_rows(pair) if row.half == "dpo again"]
    assert [row.verdict for row in again] == [
        "41 of 64 responses the same; changed beyond chance",
        "41 of 64 responses the same; no change beyond chance",
    ]
    with_course = replace(results, pairs=(pair,))
    page = page_of(with_course)
    for text in [*course.values(), *confirmations, *(row.verdict for row in again), "A/A, 99%"]:
        assert text in page
    # The curve is drawn for the model that chooses alone.
    assert page.count(">fitted curve</text>") == 1
    assert "fitted curve</text>" not in page_of(results)
    assert parse_results(results_json(with_course)) == with_course
    written = results_json(results)
    for field in ("looks", "other_looks", "asked_again", "fitted", "grid_generations"):
        assert f'"{field}"'.encode() not in written  # as older versions wrote it


def test_a_pair_of_which_nothing_was_left_shows_dpo_against_itself() -> None:
    results = sample_results()
    kept = next(pair for pair in results.pairs if not pair.decision)
    at_dpo = tuple(measured for measured in kept.measured if measured.alpha <= 0)
    again = AskedAgain(32, 32, 32, {MODELS[0]: Interval(0.0, 0.0, 0.0)}, 0.99)
    pair = replace(kept, measured=at_dpo, rejected={}, guardrails=(), asked_again=again)
    assert pair.candidate is None
    assert "dpo against itself" in page_of(replace(results, pairs=(pair,)))
