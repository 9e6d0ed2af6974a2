"""`expo-ray respond`: ask all models of a job its prompts, or one model those of a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from expo_ray.cli.exit_status import FAILED
from expo_ray.cli.flags import given_flags
from expo_ray.config import Job, PromptSource, PublishedModel, Sampling, Serving, load_job
from expo_ray.config.fields import named_after
from expo_ray.errors import Collected, JobError, Problems
from expo_ray.evaluation.check_job import check_questions, store_job_prompts
from expo_ray.evaluation.evaluate_job import respond, respond_file
from expo_ray.evaluation.prompts.load_prompts import load_prompt_set
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.responses.ask_models import ResponsesByModel
from expo_ray.evaluation.responses.check_served import check_served
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.response_file import ResponseFile
from expo_ray.serving.served_models import check_model
from expo_ray.status_file import StatusFile
from expo_ray.storage import open_store

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
    return _respond_job(load_job(arguments.job))


def _respond_job(job: Job) -> int:
    checked = check_questions(job)
    store_job_prompts(checked)
    from expo_ray.on_ray.capacity import find_devices, settled
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    store = open_store(job.output)
    with cluster(job.places("pairs", "models")), StatusFile(store) as status:
        settings = settled(job.serving, find_devices(job.serving, store))
        with serving(checked.plans, job.models, settings) as endpoint:
            return print_responses(respond(checked, endpoint.client(), status))


def _one_model(arguments: argparse.Namespace) -> int:
    """Answer a file of prompts by one model, into a file."""
    missing = [f"--{name}" for name in ("model", "prompts", "output") if not getattr(arguments, name)]
    if missing:
        raise JobError(f"{', '.join(missing)} missing; give a job file, or --model, --prompts and --output")
    problems = Collected()
    with problems.catching():
        sampling = _sampling(arguments)
    with problems.catching():
        fields = {"source": arguments.prompts, "limit": arguments.limit}
        prompts = load_prompt_set(_section(PromptSource, fields))
    with problems.catching():
        output = ResponseFile(arguments.output, arguments.format)
        output.read()
    models: list[PublishedModel] = []
    if not arguments.model.startswith(_URL):
        with problems.catching():
            fields = named_after({"uri": arguments.model, "name": arguments.name}, "uri")
            models = [_section(PublishedModel, fields)]
        with problems.catching():
            check_model(arguments.model)
    problems.raise_any()
    check_served([], models, Serving(), [prompts])
    name = models[0].name if models else arguments.name or ""
    with _endpoint(arguments.model, models) as client:
        return print_responses(respond_file(output, name, prompts, sampling, client))


def _sampling(arguments: argparse.Namespace) -> Sampling:
    """The sampling that flags and the format of the answers ask for; a flag counts before the format."""
    given = {name: getattr(arguments, name) for name in Sampling.model_fields}
    return _section(
        Sampling,
        {
            **_FORMAT_SAMPLING.get(arguments.format, {}),
            **{name: value for name, value in given.items() if value is not None},
        },
    )


@contextmanager
def _endpoint(url: str, models: Sequence[PublishedModel]) -> Iterator[Client]:
    """Connect to the endpoint at `url`; or, where there are models to serve, start one for the length of the block."""
    if not models:
        yield Client(url)
        return
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    places = {f"--model {model.name}": model.uri for model in models}
    with cluster(places), serving([], models, Serving(port=0)) as endpoint:
        yield endpoint.client()


def print_responses(responded: ResponsesByModel) -> int:
    """Print how many responses each model gave, and what failed; returns the exit status."""
    for name, answers in responded.by_model.items():
        print(_summary(name, list(answers.responses.values()), responded.places.get(name, "")))
    for text in responded.failures:
        print(f"failed: {text}", file=sys.stderr)
    return FAILED if responded.failures else 0


def _summary(name: str, responses: Sequence[Response], place: str) -> str:
    tokens = sum(response.num_tokens for response in responses) / max(1, len(responses))
    cut = sum(response.finish_reason == "length" for response in responses)
    text = f"{name}: {len(responses)} response(s), {tokens:.0f} tokens on average"
    return text + (f", {cut} cut at the longest length" if cut else "") + (f", in {place}" if place else "")


def _section(section: type[M], fields: Mapping[str, Any]) -> M:
    """Make a section of the job file from flags; those that are not given have its defaults."""
    try:
        return section.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise Problems(
            [
                JobError(
                    f"--{str(each['loc'][-1]).replace('_', '-')}: {each['msg']} (found {each['input']!r})"
                )
                for each in error.errors()
            ]
        ) from error
