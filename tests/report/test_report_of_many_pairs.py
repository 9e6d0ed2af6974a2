"""The report of more pairs than a page can hold: an overview, and a page for each pair."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from expo_ray.report.report_folder import PAGE, PAIRS, write_report
from expo_ray.report.report_page import ONE_PAGE_PAIRS, page_of, pair_pages
from expo_ray.report.results import Results
from expo_ray.storage import open_store
from tests.report.test_report import Page
from tests.support.browser import Tab
from tests.support.sample_results import sample_results

# Names that a file system or a URL would read in another way.
ODD_NAMES = ("Zephyr", "zephyr", "../../up", "a b?c#d%2e", "n" * 300, "\u00fc.b", "..")


def results_of(names: tuple[str, ...]) -> Results:
    """The sample's pairs by turns, under these names."""
    results = sample_results()
    pairs = [replace(results.pairs[number % 3], name=name) for number, name in enumerate(names)]
    return replace(results, pairs=tuple(pairs))


def numbered(count: int) -> Results:
    return results_of(tuple(f"pair-{number:04d}" for number in range(count)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many")
    write_report(open_store(str(path)), results_of(ODD_NAMES))
    return path


def links(page: Page) -> list[str]:
    return [href for tag, attributes in page.elements if tag == "a" and (href := attributes.get("href"))]


def test_the_overview_links_a_page_of_each_pair_inside_the_folder(folder: Path) -> None:
    overview = Page((folder / PAGE).read_text())
    assert overview.unbalanced == []
    assert not [tag for tag, _ in overview.elements if tag in ("figure", "article", "details")]
    files = {link for link in links(overview) if not link.startswith("#")}
    assert len(files) == len(ODD_NAMES)
    for file in files:
        assert re.fullmatch(r"pairs/[a-z0-9._-]{1,80}\.html", file)
        assert (folder / "report" / file).is_file()
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(
        ["index.html", *(Path(file).name for file in files)]
    )
    # Even where upper and lower case are the same.
    assert len({file.lower() for file in files}) == len(files)


def test_the_page_of_a_pair_shows_what_a_short_report_shows_of_it(folder: Path) -> None:
    results = results_of(ODD_NAMES)
    for page in pair_pages(results):
        text = (folder / PAIRS / page.file).read_text()
        alone = page_of(replace(results, pairs=(page.pair,)))
        assert article(text) == article(alone)
        assert Page(text).unbalanced == []
        assert len(set(Page(text).ids())) == len(Page(text).ids())
        assert html.escape(page.pair.name[:60], quote=False) in text.replace("&#39;", "'")


def article(text: str) -> str:
    return text[text.index("<article") : text.index("</article>")]


def test_pages_lead_to_each_other_by_gain_and_back_to_the_overview(folder: Path) -> None:
    pages = pair_pages(results_of(ODD_NAMES))
    overview = Page((folder / PAGE).read_text())
    shown = [link for link in links(overview) if link.startswith("pairs/")]
    assert shown == [f"pairs/{page.file}" for page in pages]
    for page, before, after in zip(pages, [None, *pages], [*pages[1:], None], strict=False):
        found = links(Page((folder / PAIRS / page.file).read_text()))
        assert found[0] == "../index.html"
        assert found[1:-1] == [each.file for each in (before, after) if each]


def test_the_overview_says_why_pairs_failed_and_which_have_warnings() -> None:
    results = replace(numbered(9), failures={"broken": "out of memory " * 100, "gone": "not there"})
    overview = Page(page_of(results))
    (reason,) = (row for row in overview.row("Pairs by gain", "broken") if row.startswith("out of memory"))
    assert len(reason) < 400
    assert "of 1,400 characters" in reason
    assert "not there" in overview.row("Pairs by gain", "gone")
    assert "#failed" in links(overview)
    assert "failed" in overview.ids()
    warned = [row for row in overview.tables[next(iter(overview.tables))] if row and "warning" in row[1]]
    assert len(warned) == sum(bool(pair.warnings) for pair in results.pairs) > 0


def test_the_overview_takes_few_bytes_for_each_pair() -> None:
    few, many = (len(page_of(numbered(count)).encode()) for count in (100, 1100))
    assert (many - few) / 1000 < 2500


def test_a_report_of_few_pairs_is_one_page(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_report(store, numbered(ONE_PAGE_PAIRS))
    assert [info.key for info in store.list()] == [PAGE]
    assert store.read(PAGE).count(b"</article>") == ONE_PAGE_PAIRS


@pytest.mark.browser
def test_a_browser_follows_the_links_and_asks_nobody_else(tab: Tab, folder: Path) -> None:
    overview = (folder / PAGE).as_uri()
    for width in (1280, 360):
        tab.open(overview, width)
        assert tab.requests == [overview]
        assert tab.complaints == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        pages = tab.evaluate("[...document.querySelectorAll('.overview tbody th a')].map(link => link.href)")
        assert len(pages) == len(ODD_NAMES)
        for page in pages[:2]:
            tab.open(page, width)
            assert tab.requests == [page]
            assert tab.complaints == []
            assert tab.evaluate("document.querySelectorAll('article').length") == 1
            assert tab.evaluate("document.querySelectorAll('figure svg').length") == 4
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("document.querySelector('nav a').href") == overview
