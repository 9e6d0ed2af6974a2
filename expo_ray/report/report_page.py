"""The page `report/index.html`: all results of a run in a file that loads nothing from elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expo_ray.errors import JobError
from expo_ray.report.formatting import alpha_text, bounded, cost_name, cost_value, visible
from expo_ray.report.page_figures import draw_pair
from expo_ray.report.page_tables import (
    AlphaRow,
    EvidenceRow,
    ExampleView,
    GroupRow,
    all_models,
    alpha_rows,
    chance_rows,
    decision_text,
    evidence_rows,
    example_views,
    group_rows,
    overview_row,
    sorted_pairs,
)
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import read_results
from expo_ray.report.svg import Drawing
from expo_ray.storage import Store, join_uri

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report/index.html"


@dataclass(frozen=True)
class PairView:
    """A pair as the template takes it."""

    anchor: str
    result: PairResult
    decision: str
    candidate: str
    drawings: list[Drawing]
    evidence: list[EvidenceRow]
    alphas: list[AlphaRow]
    groups: list[GroupRow]
    examples: list[ExampleView]


def write_report(store: Store, results: Results | None = None) -> str:
    """Write the page of the run whose output folder `store` is; gives its URI.

    Args:
        store: any that can be written.
        results: of the run; None reads them from the store.

    Raises:
        OutputError: if the store has no results that this version reads.
        JobError: if what draws the page is not installed.
    """
    store.put(PAGE, page_of(results or read_results(store)).encode())
    return join_uri(store.uri, PAGE)


def page_of(results: Results) -> str:
    """The page; the same results give the same text. Long texts are cut: `results.json` and the stored rows hold them whole."""
    results = bounded(results)
    try:
        template = template_environment().get_template("page.html")
        views = [
            _view(pair, number, results.confidence) for number, pair in enumerate(sorted_pairs(results), 1)
        ]
    except ImportError as error:
        raise JobError(
            f"the report is drawn with jinja2 and matplotlib, and {error.name} is not installed; pip install 'expo-ray[evaluate]'"
        ) from error
    models = all_models(results)
    return template.render(
        results=results,
        pairs=views,
        models=models,
        overview=[overview_row(view.result, view.anchor, models) for view in views],
        chances=chance_rows(results),
        improved=sum(pair.decision != 0 for pair in results.pairs),
    )


def _view(pair: PairResult, number: int, confidence: float) -> PairView:
    name = re.sub(r"[^a-z0-9]+", "-", pair.name.lower()).strip("-")[:60]
    return PairView(
        f"pair-{number}-{name}",
        pair,
        decision_text(pair),
        "" if pair.candidate is None else alpha_text(pair.candidate),
        draw_pair(pair, f"f{number}", confidence),
        evidence_rows(pair),
        alpha_rows(pair),
        group_rows(pair),
        example_views(pair),
    )


def template_environment() -> Environment:
    """The templates of this package, which escape every text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expo_ray.report"),
        # Responses, prompts and names are whatever a model or a user wrote.
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"alpha": alpha_text, "cost_name": cost_name}
    environment.globals |= {"cost_value": cost_value}
    return environment
