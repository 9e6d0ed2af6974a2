"""A job's models where they are served: their names, and the plans of the engines that hold them.

A served name is `<pair>@<alpha>`, `<pair>` for dpo, or the name of a published model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from expo_ray.config import Job, Pair, format_alpha
from expo_ray.errors import Collected, ExpoError
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.plan_job import call_for_each, outputs_of
from expo_ray.extrapolation.step import Step, parse_step
from expo_ray.published.verify import refuse_foreign_files
from expo_ray.serving.adapters import merged_plan, note_of_merging, reason_to_merge
from expo_ray.storage import open_store

log = logging.getLogger("expo_ray")

# Header of a request: the served name that the client will probably ask for next, whose weights are then made ahead.
NEXT_MODEL = "Expo-Next-Model"


class NameFault(ExpoError):
    """The name in a request is not one that can be served."""


@dataclass(frozen=True, slots=True)
class ServedName:
    """The model that a request asks for.

    Attributes:
        base: a pair or a published model.
        step: None where the name has none; a pair then answers as dpo.
    """

    base: str
    step: Step | None

    def __str__(self) -> str:
        return self.base if self.step is None else f"{self.base}@{self.step}"


def parse_name(text: str) -> ServedName:
    """Split a served name into the pair or model and the step.

    Raises:
        NameFault: if what follows the `@` is no step.
    """
    base, at, step = text.partition("@")
    if not at:
        return ServedName(base, None)
    try:
        return ServedName(base, parse_step(step))
    except ValueError as error:
        raise NameFault(
            f"model {text!r}: {error}; write `{base}@0.5`, with any finite number of at least -1"
        ) from error


def served_names(job: Job) -> list[str]:
    """Names of all models that a job evaluates."""
    return [name for names in names_by_engine(job).values() for name in names]


def names_by_engine(job: Job) -> Mapping[str, Sequence[str]]:
    """Served names, by the pair or model whose engines answer for them; alpha 0, dpo itself, is always among a pair's."""
    pairs = {
        pair.name: [f"{pair.name}@{format_alpha(alpha)}" for alpha in sorted({0.0, *pair.alphas})]
        for pair in job.pairs
    }
    return pairs | {model.name: [model.name] for model in job.models}


def plan_served_pairs(job: Job) -> list[PairPlan]:
    """Plan the pairs of a job as engines hold them: whole models, or an adapter whose alphas one engine serves side by side.

    An adapter that the job scales is merged where vLLM cannot serve it so; the log says why.

    Raises:
        Problems: with everything that is wrong with any pair or published model.
    """
    problems, plans = Collected(), list[PairPlan]()
    with problems.catching():
        plans = call_for_each(lambda pair: _plan_served(job, pair), job.pairs)
    with problems.catching():
        call_for_each(lambda model: check_model(model.uri), job.models)
    problems.raise_any()
    return plans


def check_model(uri: str) -> None:
    """Check that there is a model at `uri`.

    Raises:
        NotFound: if it has no configuration.
        ExpoError: as `refuse_foreign_files`.
    """
    store = open_store(uri)
    refuse_foreign_files(store)
    store.stat("config.json")


def _plan_served(job: Job, pair: Pair) -> PairPlan:
    plan = plan_pair(pair, outputs_of(job, pair))
    if not plan.scaled:
        return plan
    merged = merged_plan(
        plan
    )  # in any case: an engine may come to it, and what it refuses no engine can hold
    reason = reason_to_merge(plan, job.serving.engine)
    if not reason:
        return plan
    log.info("%s: %s", plan.name, note_of_merging(reason))
    return replace(merged, notes=(*merged.notes, note_of_merging(reason)))
