"""A job's models where they are served: what they are called, and what engines hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from expo_ray.config import Job, Pair, format_alpha
from expo_ray.errors import Attempts
from expo_ray.extrapolation.plan import PairPlan, plan_pair, plan_parents
from expo_ray.extrapolation.plan_job import outputs_of
from expo_ray.published.verify import refuse_foreign_files
from expo_ray.storage import open_store


def served_names(job: Job) -> list[str]:
    """All models that a job evaluates: `<pair>@<alpha>`, and the published ones by name."""
    return [name for names in served_by_engine(job).values() for name in names]


def served_by_engine(job: Job) -> Mapping[str, Sequence[str]]:
    """The same, by the pair or model whose engines answer for them; dpo itself, at alpha 0, is always among a pair's."""
    pairs = {
        pair.name: [f"{pair.name}@{format_alpha(alpha)}" for alpha in sorted({0.0, *pair.alphas})]
        for pair in job.pairs
    }
    return pairs | {model.name: [model.name] for model in job.models}


def served_plans(job: Job) -> list[PairPlan]:
    """The pairs of a job as engines hold them: whole models, LoRA adapters merged, whatever is published in the end.

    Raises:
        Problems: with everything that is wrong with any pair or published model.
    """
    attempts = Attempts()
    plans = [plan for pair in job.pairs for plan in attempts.attempt(partial(_whole, job, pair))]
    for model in job.models:
        attempts.attempt(partial(check_model, model.uri))
    attempts.end()
    return plans


def check_model(uri: str) -> None:
    """See that there is a model at `uri`; errors as of `refuse_foreign_files`, and `NotFound` without a configuration."""
    store = open_store(uri)
    refuse_foreign_files(store)
    store.stat("config.json")


def _whole(job: Job, pair: Pair) -> PairPlan:
    plan = plan_pair(pair, outputs_of(job, pair))
    if not plan.scaled:
        return plan
    merged = pair.model_copy(update={"adapter": "merge"})
    return plan_parents(merged, plan.sft, plan.dpo, plan.outputs)
