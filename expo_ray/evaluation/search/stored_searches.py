"""The finished searches of a job: found by their inputs alone, so no cluster is needed for it."""

from __future__ import annotations

from expo_ray.errors import NotFound, OutputError
from expo_ray.evaluation.check_job import CheckedJob
from expo_ray.evaluation.paths import SEARCHES, search_key
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import call_for_each
from expo_ray.report.results import PairResult
from expo_ray.report.results_file import RESULTS_BYTES, parse_results
from expo_ray.storage import Store, open_store


def read_stored_searches(checked: CheckedJob) -> dict[str, PairResult]:
    """Read the searches that earlier runs of a job have finished, by pair.

    Raises:
        StorageError: if the output cannot be read.
    """
    store = open_store(checked.job.output)
    stored = {
        info.key for info in store.list(SEARCHES)
    }  # one request, where each pair has several possible keys

    def read(plan: PairPlan) -> PairResult | None:
        keys = (search_key(plan.name, each) for each in checked.stored_search_ids(plan))
        return next(filter(None, (_read_search(store, key) for key in keys if key in stored)), None)

    results = zip(checked.plans, call_for_each(read, checked.plans), strict=True)
    return {plan.name: result for plan, result in results if result}


def _read_search(store: Store, key: str) -> PairResult | None:
    """Read a finished search; None if there is none, or one of another version: it is then repeated from the stored rows."""
    try:
        results = parse_results(store.read(key, most_bytes=RESULTS_BYTES), f"{store.uri}/{key}")
    except (NotFound, OutputError):
        return None
    return results.pairs[0] if results.pairs else None
