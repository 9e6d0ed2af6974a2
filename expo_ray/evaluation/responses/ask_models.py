"""Ask all models of a job, or one model into a file: the work of `expo-ray respond` once there is an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from expo_ray.config import Job, Sampling
from expo_ray.errors import EndpointError, PromptError
from expo_ray.evaluation.paths import responses_root
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.responses.ask_missing import (
    ModelResponses,
    OpenQuestions,
    ask_open_questions,
    find_open_questions,
    questions_for,
    run_all,
)
from expo_ray.evaluation.responses.ask_question import origin_of
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import Card
from expo_ray.evaluation.responses.response_file import ResponseFile, check_origins
from expo_ray.progress import Counters
from expo_ray.serving.served_models import names_by_engine
from expo_ray.storage import Store, join_uri
from expo_ray.text import shown_names


@dataclass
class ResponsesByModel:
    """The responses of several models, and what failed.

    Attributes:
        by_model: by served name, including models that left some prompts without an answer.
        places: URI of the responses, by served name.
        failures: a message for each failure.
    """

    by_model: dict[str, ModelResponses] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def ask_job_models(
    job: Job, sets: Sequence[PromptSet], store: Store, client: Client, progress: Counters
) -> ResponsesByModel:
    """Ask all models of a job for the responses that `store` lacks, and store them.

    Engines of different pairs and models work at the same time, and a model that fails does not stop the others.

    Raises:
        StorageError: if responses cannot be read or written.
    """

    async def run() -> ResponsesByModel:
        collected = ResponsesByModel()
        async with client:
            by_engine = [
                await _find_open_questions(client, names, job, sets, store=store, collected=collected)
                for names in names_by_engine(job).values()
            ]
            for questions in (questions for of_engine in by_engine for questions in of_engine):
                progress.expect(rows=len(questions.missing), kept=len(questions.stored))
                name = questions.card.name
                collected.places[name] = join_uri(store.uri, responses_root(name))
            busy = sum(any(questions.missing for questions in of_engine) for of_engine in by_engine)
            concurrency = -(-client.concurrency // max(1, busy))
            await run_all(
                [_ask_engine(client, of_engine, collected, progress, concurrency) for of_engine in by_engine]
            )
        return collected

    return asyncio.run(run())


def ask_into_file(
    output: ResponseFile,
    name: str,
    prompts: PromptSet,
    sampling: Sampling,
    *,
    client: Client,
    progress: Counters,
) -> ResponsesByModel:
    """Ask one model for the responses that a file lacks, and complete the file.

    Args:
        name: served name; empty for the only model of the endpoint.

    Raises:
        EndpointError: if the endpoint cannot be reached, or does not serve the model.
        OutputError: if the file holds responses from other weights, sampling or engine.
        StorageError: if it cannot be read or written.
    """
    collected = ResponsesByModel()

    async def run() -> OpenQuestions:
        async with client:
            card = await client.card(name or await _only_name(client))
            questions = _open_questions_of_file(output, card, prompts, sampling)
            progress.expect(rows=len(questions.missing), kept=len(questions.stored))
            await _ask_engine(client, [questions], collected, progress, client.concurrency)
        return questions

    questions = asyncio.run(run())
    served_name = questions.card.name
    output.write(prompts)
    collected.places[served_name] = output.uri
    answered = collected.by_model.get(served_name, ModelResponses(questions.stored))
    try:
        output.export(prompts, answered.responses, sampling.samples)
    except PromptError as error:
        collected.failures.append(str(error))
    return collected


def _open_questions_of_file(
    output: ResponseFile, card: Card, prompts: PromptSet, sampling: Sampling
) -> OpenQuestions:
    """Read a file, and find the questions that it has no response to.

    Raises:
        OutputError: if it holds responses from other weights, sampling or engine.
        StorageError: if it cannot be read.
    """
    wanted = questions_for(card, [prompts], sampling)
    rows = output.read()
    origins = {origin_of(card, question.sampling) for question in wanted.values()}
    check_origins(output.uri, rows, origins)
    stored = {key: rows[key] for key in wanted if key in rows}
    missing = [question for key, question in wanted.items() if key not in stored]
    return OpenQuestions(card, [prompts], stored, missing, dict.fromkeys(origins, output.parts))


async def _find_open_questions(
    client: Client,
    names: Sequence[str],
    job: Job,
    sets: Sequence[PromptSet],
    *,
    store: Store,
    collected: ResponsesByModel,
) -> list[OpenQuestions]:
    """Find the open questions of the models on one engine; a model that fails is added to the failures."""
    questions = []
    for name in names:
        try:
            questions.append(await find_open_questions(client, name, sets, job.sampling, store))
        except EndpointError as error:
            collected.failures.append(f"{name}: {error}")
    return questions


async def _ask_engine(
    client: Client,
    of_engine: Sequence[OpenQuestions],
    collected: ResponsesByModel,
    progress: Counters,
    concurrency: int,
) -> None:
    """Ask the models of one engine: as many at the same time as it answers without a swap, mostly one after the other."""
    at_once = min((questions.card.alphas_at_once for questions in of_engine), default=1)
    turns, share = asyncio.Semaphore(at_once), -(-concurrency // max(1, min(at_once, len(of_engine))))
    failed = False
    open_names = [questions.card.name for questions in of_engine if questions.missing]
    client.next_models |= dict(pairwise(open_names))

    async def ask(questions: OpenQuestions) -> None:
        nonlocal failed
        name = questions.card.name
        try:
            if failed:  # asked for once: an endpoint that is gone costs no minutes of repeated requests
                await client.card(name)
            collected.by_model[name] = await ask_open_questions(client, questions, progress, share)
        except EndpointError as error:
            failed = True
            collected.failures.append(f"{name}: {error}")
        else:
            collected.failures += [f"{name}: {problem}" for problem in collected.by_model[name].problems]

    async def in_turn(questions: OpenQuestions) -> None:
        async with turns:
            await ask(questions)

    await run_all([in_turn(questions) for questions in of_engine])


async def _only_name(client: Client) -> str:
    names = await client.names()
    if len(names) != 1:
        remedy = "choose one with --name" if names else "start one there"
        raise EndpointError(f"{client.url}: serves {shown_names(names) or 'no models'}; {remedy}")
    return names[0]
