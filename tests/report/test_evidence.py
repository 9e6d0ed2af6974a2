"""What the report shows of the evidence for an alpha: roles, and what they found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from expo_ray.report.formatting import signed
from expo_ray.report.page_tables import chance_rows, evidence_rows, false_discovery_rates
from expo_ray.report.report_page import page_of
from expo_ray.report.results import Interval, RoleTest
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
