"""The results of an AlpacaEval run: figures as JSON, tables for people, and a page."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from expo_ray.benchmark.alpaca_eval.judge_answers import AlpacaResult, PreparedAlpaca
from expo_ray.benchmark.tables import (
    arm_json,
    arms_table,
    checks_table,
    difference_json,
    differences_forest,
    differences_table,
    duel_json,
    head_to_head_forest,
    head_to_head_json,
    head_to_head_table,
    markdown,
)
from expo_ray.errors import JobError
from expo_ray.report.benchmark_page import Table, benchmark_page

log = logging.getLogger("expo_ray")


def write_alpaca_results(
    prepared: PreparedAlpaca, result: AlpacaResult
) -> tuple[dict[str, Any], list[Table]]:
    """Write `results.json`, `results.md` and `results.html` into the run's folder, and return the figures and the tables."""
    summary, tables = result_json(prepared, result), result_tables(prepared, result)
    prepared.store.put("results.json", (json.dumps(summary, indent=1) + "\n").encode())
    prepared.store.put("results.md", markdown(tables).encode("utf-8", "replace"))
    _write_page(prepared, result, tables)
    return summary, tables


def result_json(prepared: PreparedAlpaca, result: AlpacaResult) -> dict[str, Any]:
    """All figures, unrounded, in percent; intervals are two-sided, 95 %."""
    judge = prepared.request.judge
    summary: dict[str, Any] = {
        "judge": judge.model,
        "protocol": judge.protocol,
        "length_control": result.length_control,
        "cost": result.cost,
        "notes": list(prepared.notes),
    }
    if result.direct:
        summary["head_to_head"] = duel_json(result.direct) | head_to_head_json([result.direct])
    if result.score:
        summary |= arm_json(result.score)
    if result.reference:
        summary["against"] = arm_json(result.reference)
    if result.difference:
        summary["difference"] = difference_json(result.difference)
    summary["answers"] = {name: asdict(checks) for name, checks in result.checks.items()}
    summary["judge_card"] = asdict(result.judge_card) if result.judge_card else None
    return summary


def result_tables(prepared: PreparedAlpaca, result: AlpacaResult) -> list[Table]:
    """The figures for people, the primary one first; the judge is named below each table."""
    scores = [score for score in (result.score, result.reference) if score]
    tables = []
    if result.direct:
        tables.append(head_to_head_table([result.direct]))
    if scores:
        tables.append(arms_table(scores, prepared.request.judge.model))
    if result.difference:
        tables.append(differences_table([result.difference]))
    tables.append(checks_table(result.checks))
    card = result.judge_card
    notes = (
        [str(card), *(f"Warning: {warning}." for warning in card.warnings)]
        if card
        else [f"No judge card of {prepared.request.judge.model}: `expo-ray benchmark judge` makes one."]
    )
    return [
        replace(table, notes=(*table.notes, *notes)) if table is not tables[-1] else table for table in tables
    ]


def _write_page(prepared: PreparedAlpaca, result: AlpacaResult, tables: Sequence[Table]) -> None:
    forests = [head_to_head_forest([result.direct])] if result.direct else []
    forests += [differences_forest([result.difference])] if result.difference else []
    try:
        page = benchmark_page("AlpacaEval", tables, forests)
    except JobError as error:
        log.warning("no page of results: %s", error)
    else:
        prepared.store.put("results.html", page.encode("utf-8", "replace"))
