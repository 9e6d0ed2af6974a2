"""The whole product: plan every pair, choose its alpha behind an endpoint, publish the winners, write the report.

What each stage makes is stored at a place that follows from its inputs, so a rerun does what is missing and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import ray

from expo_ray.config import Job, Pair
from expo_ray.evaluation.prompts import keep_prompts
from expo_ray.extrapolation.job import outputs_of, plan_job
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.progress import Progress
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.push_job import push_winners
from expo_ray.extrapolation.run import run_job
from expo_ray.extrapolation.step import GROUPS, Step
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.extrapolation import OnRay
from expo_ray.on_ray.prepared import Prepared, versions
from expo_ray.on_ray.search_pairs import search_pairs
from expo_ray.report.page import write_report
from expo_ray.report.results import PairResult, Results
from expo_ray.report.stored import write_results
from expo_ray.storage import Store, open_store

# Published models by pair and alpha.
Models = Mapping[str, Mapping[float, Published]]


def run_pipeline(prepared: Prepared) -> Results:
    """Do all that is missing. A pair that fails does not stop the others; it is named in `failures`.

    Raises:
        ExpoError: if no pair can be worked on at all.
    """
    job = prepared.job
    store = open_store(job.output)
    for prompts in prepared.sets:  # an output that cannot be written is found out before engines start
        keep_prompts(store, prompts)
    started = time.monotonic()
    with cluster():
        searched = search_pairs(prepared, store)
        published, not_published = _publish(job, searched.found, store)
        resources = ray.cluster_resources()
    seconds = time.monotonic() - started
    results = Results(
        output=store.uri,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        pairs=tuple(_with_models(result, published) for result in searched.found.values()),
        cost={
            "seconds": round(seconds, 1),
            "cpu_hours": round(seconds * resources.get("CPU", 0) / 3600, 3),
            "gpu_hours": round(seconds * resources.get("GPU", 0) / 3600, 3),
            "generations": sum(result.generations for result in searched.found.values()),
            "generated_tokens": searched.num_tokens,
            "bytes_written": sum(model.size for models in published.values() for model in models.values()),
        },
        versions=versions(),
        digests=prepared.digests,
        failures=searched.failures | not_published,
        confidence=job.search.confidence,
    )
    write_results(store, results)
    write_report(store, results)
    # After the report: sending whole models may take longer than anybody waits for it.
    pushed = push_winners(job, _winners(searched.found, published))
    if pushed.addresses or pushed.failures:
        results = replace(
            results,
            pairs=tuple(replace(pair, pushed=pushed.addresses.get(pair.name, "")) for pair in results.pairs),
            failures={**results.failures, **pushed.failures},
        )
        write_results(store, results)
        write_report(store, results)
    return results


def _publish(job: Job, found: Mapping[str, PairResult], store: Store) -> tuple[Models, dict[str, str]]:
    """Publish the winners, with what was found written into their cards; what is published already is left alone."""
    chosen = [_chosen(pair, found[pair.name], job) for pair in job.pairs if pair.name in found]
    winners = [pair for pair in chosen if pair.alphas]
    if not winners:
        return {}, {}
    plan = plan_job(winners, [outputs_of(job, pair) for pair in winners])

    def publish_with_result(plan: PairPlan, alpha: float) -> Published:
        return publish(plan, alpha, found[plan.name])

    with (
        Progress(store) as progress,
        OnRay(progress, device=job.device, publish_task=publish_with_result) as executor,
    ):
        outcome = run_job(plan, executor, progress)
        progress.finish(
            "failed" if outcome.failures else "done", len(outcome.published), sorted(outcome.failures)
        )
    published: dict[str, dict[float, Published]] = {}
    for model in outcome.published:
        published.setdefault(model.pair, {})[model.alpha] = model
    return published, {name: str(error) for name, error in outcome.failures.items()}


def _chosen(pair: Pair, result: PairResult, job: Job) -> Pair:
    """The pair with the alphas and multipliers to publish; no alpha where dpo is kept and nothing else is asked for."""
    asked = pair.alphas if job.publish == "all" else ()
    alphas = sorted({*asked, *([result.decision] if result.decision else [])})
    step = Step.of(
        result.decision, {group: result.multipliers[group] for group in GROUPS if group in result.multipliers}
    )
    return pair.model_copy(
        update={"alphas": tuple(alphas), "multipliers": step.multipliers(pair.multipliers)}
    )


def _winners(found: Mapping[str, PairResult], published: Models) -> dict[str, str]:
    """Folder of the chosen alpha, of each pair that has one."""
    return {
        name: published[name][result.decision].uri
        for name, result in found.items()
        if result.decision and result.decision in published.get(name, {})
    }


def _with_models(result: PairResult, published: Models) -> PairResult:
    models = published.get(result.name, {})
    effective = {alpha: one.effective_alpha for alpha, one in models.items()}
    return replace(
        result,
        published={alpha: one.uri for alpha, one in models.items()},
        effective_alphas={alpha: value for alpha, value in effective.items() if value is not None},
    )
