"""The report of a pipeline's searches and published winners, and the push of the winners to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from expo_ray.config import Job
from expo_ray.errors import ExpoError, in_one_line
from expo_ray.evaluation.check_job import CheckedJob, package_versions
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.publish import Published
from expo_ray.published.push import push_models
from expo_ray.report import report_folder
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import write_results
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")


@dataclass(frozen=True)
class Usage:
    """Time of a step, and what the cluster had meanwhile."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
        )


@dataclass
class Searches:
    """The searches of a job's pairs.

    Attributes:
        results: by pair, in the job's order.
        failures: error by pair.
        num_tokens: of all responses that were looked at.
    """

    results: dict[str, PairResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0
    usage: Usage = field(default_factory=Usage)

    def add_failure(self, plans: Iterable[PairPlan], error: ExpoError) -> None:
        """Record and log why these pairs have no result; those with a result or an earlier failure keep that."""
        for plan in plans:
            if plan.name not in self.results and plan.name not in self.failures:
                self.failures[plan.name] = in_one_line(error)
                log.error("%s failed: %s", plan.name, in_one_line(error))


@dataclass
class Winners:
    """The models that were published after the search.

    Attributes:
        models: by pair and alpha.
        failures: error by pair.
    """

    models: dict[str, dict[float, Published]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


def write_report(checked: CheckedJob, searches: Searches, winners: Winners) -> Results:
    """Write `results.json` and the report's page into the output; returns the results."""
    results = Results(
        output=open_store(checked.job.output).uri,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        pairs=tuple(
            _with_models(result, winners.models.get(name, {})) for name, result in searches.results.items()
        ),
        cost=_cost(searches, winners),
        versions=package_versions(),
        digests=checked.digests(),
        failures=searches.failures | winners.failures,
        confidence=checked.job.search.confidence,
    )
    _write(results)
    return results


def push_winners(results: Results, job: Job) -> Results:
    """Push the winners to the Hub if the job names repositories; write the report again with their addresses."""
    winners = {
        pair.name: pair.published[pair.decision]
        for pair in results.pairs
        if pair.decision and pair.decision in pair.published
    }
    pushed = push_models(job, winners)
    if not pushed.addresses and not pushed.failures:
        return results
    results = replace(
        results,
        pairs=tuple(replace(pair, pushed=pushed.addresses.get(pair.name, "")) for pair in results.pairs),
        failures={**results.failures, **pushed.failures},
    )
    _write(results)
    return results


def _write(results: Results) -> None:
    store = open_store(results.output)
    write_results(store, results)
    report_folder.write_report(store, results)


def _cost(searches: Searches, winners: Winners) -> Mapping[str, float]:
    usage = searches.usage + winners.usage
    published: Sequence[Published] = [
        model for models in winners.models.values() for model in models.values()
    ]
    return {
        "seconds": round(usage.seconds, 1),
        "cpu_hours": round(usage.cpu_seconds / 3600, 3),
        "gpu_hours": round(usage.gpu_seconds / 3600, 3),
        "generations": sum(result.generations for result in searches.results.values()),
        "generated_tokens": searches.num_tokens,
        "bytes_written": sum(model.size for model in published),
    }


def _with_models(result: PairResult, models: Mapping[float, Published]) -> PairResult:
    """Add what was published of a pair to its result."""
    return replace(
        result,
        published={alpha: model.uri for alpha, model in models.items()},
        effective_alphas={
            alpha: model.effective_alpha
            for alpha, model in models.items()
            if model.effective_alpha is not None
        },
    )
