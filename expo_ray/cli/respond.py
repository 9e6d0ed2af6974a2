"""`expo-ray respond`: a job's prompts to all its models, or a file of prompts to one model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from expo_ray.cli.flags import given_flags
from expo_ray.config import Job, PromptSource, PublishedModel, Sampling, Serving, load_job
from expo_ray.config.fields import named_after
from expo_ray.errors import Attempts, JobError, Problems, StorageError
from expo_ray.evaluation.prompts.load_prompts import load_prompt_set, load_prompts
from expo_ray.evaluation.prompts.prompt_set import PromptSet, store_prompts
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.responses.ask_models import ResponsesByModel, ask_into_file, ask_job_models
from expo_ray.evaluation.responses.check_served import check_served, check_writable
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.response_file import ResponseFile
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.progress import Progress
from expo_ray.serving.engine_checks import check_engine
from expo_ray.serving.served_models import check_model, plan_served_pairs
from expo_ray.storage import open_store

FAILED = 1
_URL = ("http://", "https://")
_WITHOUT_JOB = ("model", "name", "prompts", "limit", "output", *Sampling.model_fields)
# MT-Bench's own answers are drawn as FastChat's gen_model_answer.py draws them; the temperature is each question's.
_FORMAT_SAMPLING: Mapping[str, Mapping[str, float]] = {
    "mt-bench": {
        "top_p": 1.0,
        "top_k": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 1024,
    }
}
M = TypeVar("M", bound=BaseModel)


def command(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status is 0, or 1 if something was left without an answer.

    Raises:
        ExpoError: for everything wrong with the input, before any engine starts.
    """
    if not arguments.job:
        return _one_model(arguments)
    given = given_flags(arguments, _WITHOUT_JOB)
    if given or arguments.format != "jsonl":
        raise JobError(
            f"{', '.join(given) or '--format'} beside a job file; set it there, or leave the file out"
        )
    return respond(load_job(arguments.job))


def respond(job: Job) -> int:
    """Ask all models of a job, and print what came of it; the exit status."""
    plans, sets = check(job)
    check_asked(job, plans, sets)
    store = open_store(job.output)
    for prompts in sets:  # an output that cannot be written is found out before engines start
        store_prompts(store, prompts)
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    with cluster(), serving(plans, job.models, job.serving) as endpoint:
        client = Client(endpoint.url, slots=endpoint.slots, key_variable=endpoint.key_variable)
        with Progress("respond", store, rows="responses") as progress:
            return _finish(partial(ask_job_models, job, sets, store, client, progress), progress)


def check(job: Job) -> tuple[list[PairPlan], list[PromptSet]]:
    """The plans of a job's pairs, and its prompts.

    Raises:
        Problems: with everything that is wrong with pairs, models and prompts.
    """
    attempts = Attempts()
    if not job.prompts:
        attempts.problems.append(
            JobError(
                "the job has no `prompts`; list at least one item there, such as `source: ultrafeedback`"
            )
        )
    sets = [one for found in attempts.attempt(partial(load_prompts, job.prompts)) for one in found]
    plans = [plan for found in attempts.attempt(partial(plan_served_pairs, job)) for plan in found]
    attempts.end()
    return plans, sets


def check_asked(
    job: Job, plans: Sequence[PairPlan], sets: Sequence[PromptSet], *, needs_all: bool = False
) -> None:
    """See that engines can hold a job's models and answer its prompts, and that the answers can be stored.

    Args:
        needs_all: whether one prompt without an answer fails the job, as it does a search.

    Raises:
        Problems: with everything that is certain to fail.
    """
    attempts = Attempts()
    attempts.attempt(partial(check_served, plans, job.models, job.serving, sets, needs_all=needs_all))
    attempts.attempt(partial(check_engine, job.serving, plans))
    attempts.attempt(partial(check_writable, job.output))
    attempts.end()


def _one_model(arguments: argparse.Namespace) -> int:
    missing = [f"--{name}" for name in ("model", "prompts", "output") if not getattr(arguments, name)]
    if missing:
        raise JobError(f"{', '.join(missing)} missing; give a job file, or --model, --prompts and --output")
    attempts = Attempts()
    given = {name: getattr(arguments, name) for name in Sampling.model_fields}
    fields: dict[str, Any] = {
        **_FORMAT_SAMPLING.get(arguments.format, {}),
        **{name: value for name, value in given.items() if value is not None},
    }
    samplings = attempts.attempt(partial(_section, Sampling, fields))
    fields = {"source": arguments.prompts, "limit": arguments.limit}
    sources = attempts.attempt(partial(_section, PromptSource, fields))
    sets = [one for source in sources for one in attempts.attempt(partial(load_prompt_set, source))]
    outputs = attempts.attempt(partial(ResponseFile, arguments.output, arguments.format))
    for output in outputs:
        attempts.attempt(output.read)
    models: list[PublishedModel] = []
    if not arguments.model.startswith(_URL):
        fields = named_after({"uri": arguments.model, "name": arguments.name}, "uri")
        models = attempts.attempt(partial(_section, PublishedModel, fields))
        attempts.attempt(partial(check_model, arguments.model))
        if not attempts.problems:
            attempts.attempt(partial(check_served, [], models, Serving(), sets))
    attempts.end()
    (sampling,), (prompts,), (output,) = samplings, sets, outputs
    name = models[0].name if models else arguments.name or ""
    with _endpoint(arguments.model, models) as client, Progress("respond", rows="responses") as progress:
        work = partial(ask_into_file, output, name, prompts, sampling, client=client, progress=progress)
        return _finish(work, progress)


@contextmanager
def _endpoint(url: str, models: Sequence[PublishedModel]) -> Iterator[Client]:
    """The endpoint at `url`; or one of this job's own, where there are models to serve."""
    if not models:
        yield Client(url)
        return
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    with cluster(), serving([], models, Serving(port=0)) as endpoint:
        yield Client(endpoint.url, slots=endpoint.slots, key_variable=endpoint.key_variable)


def _finish(work: Callable[[], ResponsesByModel], progress: Progress) -> int:
    """Do the work and print what came of it; the exit status."""
    try:
        done = work()
    except StorageError as error:  # what was answered before is stored
        done = ResponsesByModel(failures=[str(error)])
    progress.finish(done.failures)
    for name, answers in done.answers.items():
        print(_summary(name, list(answers.responses.values()), done.places.get(name, "")))
    for text in done.failures:
        print(f"failed: {text}", file=sys.stderr)
    return FAILED if done.failures else 0


def _summary(name: str, responses: Sequence[Response], place: str) -> str:
    tokens = sum(one.num_tokens for one in responses) / max(1, len(responses))
    cut = sum(one.finish_reason == "length" for one in responses)
    told = f"{name}: {len(responses)} response(s), {tokens:.0f} tokens on average"
    return told + (f", {cut} cut at the longest length" if cut else "") + (f", in {place}" if place else "")


def _section(section: type[M], fields: Mapping[str, Any]) -> M:
    """What flags say of a section of the job file; those that are not given have its defaults."""
    try:
        return section.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise Problems(
            [
                JobError(f"--{str(one['loc'][-1]).replace('_', '-')}: {one['msg']} (found {one['input']!r})")
                for one in error.errors()
            ]
        ) from error
