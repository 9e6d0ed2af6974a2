"""The folder `report/` of a run: the overview, and the pages of the pairs where there are many."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from expo_ray.report.report_page import PairPage, page_of, pair_pages
from expo_ray.report.results import Results
from expo_ray.report.results_file import read_results
from expo_ray.storage import Store, join_uri

PAGE = "report/index.html"
PAIRS = "report/pairs"
# A figure takes 0.07 s of CPU time, a pair some four figures, and matplotlib draws one at a time in a process.
_MOST_PROCESSES = 8
_WRITES_AT_ONCE = 8


def write_report(store: Store, results: Results | None = None) -> str:
    """Write the report of the run whose output folder `store` is; gives the URI of its first page.

    The pages of pairs come first, so that whoever sees the overview finds them. Pages of pairs that a run no longer has are left.

    Args:
        store: any that can be written.
        results: of the run; None reads them from the store.

    Raises:
        OutputError: if the store has no results that this version reads.
        JobError: if what draws the pages is not installed.
    """
    results = results or read_results(store)
    overview = page_of(results, PAIRS.rpartition("/")[2])
    if pages := pair_pages(results):
        _write_pages(store, pages)
    store.put(PAGE, overview.encode())
    return join_uri(store.uri, PAGE)


def _write_pages(store: Store, pages: Sequence[PairPage]) -> None:
    """Draw pages in processes of their own, and store each as soon as it is drawn."""
    # Not `fork`: this process has threads, of Ray and of stores.
    context, processes = get_context("spawn"), min(_MOST_PROCESSES, os.cpu_count() or 1)
    with (
        ProcessPoolExecutor(processes, context, initializer=_ignore_interrupts) as drawing,
        ThreadPoolExecutor(processes + _WRITES_AT_ONCE, "page") as writing,
    ):

        def write(page: PairPage) -> None:
            text = drawing.submit(_draw, page).result()
            store.put(f"{PAIRS}/{page.file}", text.encode())

        for _ in writing.map(write, pages):
            pass


def _draw(page: PairPage) -> str:
    return page.text()


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that waits for the pages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
