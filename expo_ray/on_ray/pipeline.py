"""The whole product: plan every pair, choose its alpha behind an endpoint, publish the winners, write the report.

What each stage makes is stored at a place that follows from its inputs, so a rerun does what is missing and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import ray

from expo_ray.errors import ExpoError, in_one_line
from expo_ray.evaluation.prompts.prompt_set import store_prompts
from expo_ray.extrapolation.pinned import publication_plan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import outputs_of
from expo_ray.extrapolation.publish import Published, publish
from expo_ray.extrapolation.run_job import run_pairs
from expo_ray.extrapolation.step import GROUPS, Step
from expo_ray.on_ray.check_job import Prepared, versions
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.extrapolation import OnRay
from expo_ray.on_ray.search_pairs import search_pairs
from expo_ray.progress import Progress
from expo_ray.published.push_job import push_winners
from expo_ray.report.report_page import write_report
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import write_results
from expo_ray.storage import Store, open_store

log = logging.getLogger("expo_ray")

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
        store_prompts(store, prompts)
    started = time.monotonic()
    with cluster():
        searched = search_pairs(prepared, store)
        published, not_published = _publish(prepared, searched.found, store)
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


def _publish(
    prepared: Prepared, found: Mapping[str, PairResult], store: Store
) -> tuple[Models, dict[str, str]]:
    """Publish the winners from the parents that were searched, with the search's results in their cards.

    What is published already is left alone. A pair that cannot be published is named, and the others are.
    """
    plans, failures = _publication_plans(prepared, found)
    if not plans:
        return {}, failures

    def publish_with_result(plan: PairPlan, alpha: float) -> Published:
        return publish(plan, alpha, found[plan.name])

    with (
        Progress("extrapolate", store) as progress,
        OnRay(progress, device=prepared.job.device, publish_task=publish_with_result) as executor,
    ):
        outcome = run_pairs(plans, executor, progress)
        failures |= {name: in_one_line(error) for name, error in outcome.failures.items()}
        progress.finish(sorted(failures), published=len(outcome.published))
    published: dict[str, dict[float, Published]] = {}
    for model in outcome.published:
        published.setdefault(model.pair, {})[model.alpha] = model
    return published, failures


def _publication_plans(
    prepared: Prepared, found: Mapping[str, PairResult]
) -> tuple[list[PairPlan], dict[str, str]]:
    """The plans of what is to be published, and why others cannot be, by pair.

    No plan where dpo is kept and nothing else is asked for.
    """
    plans, failures, job = list[PairPlan](), dict[str, str](), prepared.job
    for pair, checked in zip(job.pairs, prepared.plans, strict=True):
        if pair.name not in found:
            continue
        result = found[pair.name]
        asked = pair.alphas if job.publish == "all" else ()
        alphas = tuple(sorted({*asked, *([result.decision] if result.decision else [])}))
        if not alphas:
            continue
        outputs = outputs_of(job, pair.model_copy(update={"alphas": alphas}))
        try:
            plans.append(publication_plan(checked, pair, _chosen_step(result), outputs))
        except ExpoError as error:
            failures[pair.name] = in_one_line(error)
            log.error("%s failed: %s", pair.name, failures[pair.name])
    return plans, failures


def _chosen_step(result: PairResult) -> Step:
    factors = {group: result.multipliers[group] for group in GROUPS if group in result.multipliers}
    return Step.of(result.decision, factors)


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
