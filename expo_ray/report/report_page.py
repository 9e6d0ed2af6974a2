"""The pages of a report, as texts: files that load nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expo_ray.errors import JobError
from expo_ray.report.formatting import alpha_text, bounded, cost_name, cost_value, cut, visible
from expo_ray.report.page_figures import draw_pair
from expo_ray.report.page_tables import (
    AlphaRow,
    EvidenceRow,
    ExampleView,
    GroupRow,
    all_models,
    alpha_rows,
    chance_rows,
    course_rows,
    decision_text,
    evidence_rows,
    example_views,
    group_rows,
    overview_row,
    sorted_pairs,
)
from expo_ray.report.results import PairResult, Results
from expo_ray.report.svg import Drawing

if TYPE_CHECKING:
    from jinja2 import Environment

# A report of so many pairs is one page, which can be sent as it is; of more, an overview and a page for each pair, as a browser
# takes no page of 1,000 pairs with all their figures.
ONE_PAGE_PAIRS = 6


@dataclass(frozen=True)
class PairView:
    """A pair as the template takes it."""

    anchor: str
    result: PairResult
    decision: str
    candidate: str
    drawings: list[Drawing]
    evidence: list[EvidenceRow]
    course: list[tuple[str, str]]
    alphas: list[AlphaRow]
    groups: list[GroupRow]
    examples: list[ExampleView]


@dataclass(frozen=True)
class PageLink:
    """The page of a pair, for the pages beside it."""

    name: str
    file: str


@dataclass(frozen=True)
class PairPage:
    """All that the page of a pair shows.

    Attributes:
        before: the page of the pair with the next larger gain, if any.
        after: the page of the pair with the next smaller gain, if any.
        output: of the run.
        version: of expo-ray that wrote the results.
    """

    pair: PairResult
    before: PageLink | None
    after: PageLink | None
    confidence: float
    output: str
    version: str

    @property
    def file(self) -> str:
        return pair_file(self.pair.name)

    def text(self) -> str:
        """Draw the page.

        Raises:
            JobError: if what draws it is not installed.
        """
        try:
            template = template_environment().get_template("pair_page.html")
            view = _view(bounded(self.pair), 1, self.confidence)
        except ImportError as error:
            raise _not_installed(error) from error
        return template.render(
            pair=view,
            before=self.before,
            after=self.after,
            confidence=self.confidence,
            output=visible(self.output),
            version=self.version,
        )


def pair_pages(results: Results) -> list[PairPage]:
    """The pages of the pairs, by falling gain; none if the overview shows the pairs itself."""
    if not _is_split(results):
        return []
    pairs = sorted_pairs(results)
    links = [None, *(PageLink(bounded(pair.name), pair_file(pair.name)) for pair in pairs), None]
    version = results.versions.get("expo-ray", "")
    return [
        PairPage(pair, before, after, results.confidence, results.output, version)
        for pair, before, after in zip(pairs, links, links[2:], strict=False)
    ]


def page_of(results: Results, pages: str = "pairs") -> str:
    """The page `index.html`; the same results give the same text. Long texts are cut: `results.json` and the stored rows hold them whole.

    Args:
        pages: folder of the pairs' own pages, if they have any, below that of this page.

    Raises:
        JobError: if what draws it is not installed.
    """
    results, split = bounded(results), _is_split(results)
    pairs = sorted_pairs(results)
    try:
        template = template_environment().get_template("page.html")
        views = [] if split else _views(pairs, results.confidence)
    except ImportError as error:
        raise _not_installed(error) from error
    links = (
        [f"{pages}/{pair_file(pair.name)}" for pair in pairs]
        if split
        else [f"#{view.anchor}" for view in views]
    )
    models = all_models(results)
    return template.render(
        results=results,
        confidence=results.confidence,
        output=results.output,
        version=results.versions.get("expo-ray", ""),
        split=split,
        views=views,
        models=models,
        overview=[overview_row(pair, link, models) for pair, link in zip(pairs, links, strict=True)],
        chances=chance_rows(results),
        improved=sum(pair.decision != 0 for pair in results.pairs),
    )


def pair_file(name: str) -> str:
    """The file of a pair's page: its name, with a digest where a file system or a browser might read the name in another way."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")[:60]
    if plain != name:
        plain += f"-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return f"{plain}.html"


def _is_split(results: Results) -> bool:
    return len(results.pairs) > ONE_PAGE_PAIRS


def _views(pairs: Sequence[PairResult], confidence: float) -> list[PairView]:
    return [_view(pair, number, confidence) for number, pair in enumerate(pairs, 1)]


def _view(pair: PairResult, number: int, confidence: float) -> PairView:
    name = re.sub(r"[^a-z0-9]+", "-", pair.name.lower()).strip("-")[:60]
    return PairView(
        f"pair-{number}-{name}",
        pair,
        decision_text(pair),
        "" if pair.candidate is None else alpha_text(pair.candidate),
        draw_pair(pair, f"f{number}", confidence),
        evidence_rows(pair),
        course_rows(pair),
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
    environment.filters |= {"alpha": alpha_text, "cost_name": cost_name, "cut": cut}
    environment.globals |= {"cost_value": cost_value}
    return environment


def _not_installed(error: ImportError) -> JobError:
    return JobError(
        f"the report is drawn with jinja2 and matplotlib, and {error.name} is not installed; pip install 'expo-ray[evaluate]'"
    )
