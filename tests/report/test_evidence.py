"""What the report shows of the evidence for an alpha: roles, and what they found."""

from __future__ import annotations

from dataclasses import replace

from expo_ray.report.page_tables import evidence_rows
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
    assert [(row.role, row.verdict) for row in rows if row.half == "confirming"] == [
        ("chooses: a gain", "no gain beyond chance"),
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
