"""All models of a job, or one model into a file: what `expo-ray respond` does once there is an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from expo_ray.config import Job, Sampling
from expo_ray.errors import EndpointError, PromptError
from expo_ray.evaluation.paths import responses_root
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.responses.ask_missing import (
    ModelResponses,
    OpenQuestions,
    answer,
    find_open_questions,
    questions_of,
    run_all,
)
from expo_ray.evaluation.responses.ask_question import origin_of
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.response_file import ResponseFile, check_origins
from expo_ray.progress import Counters
from expo_ray.serving.served_models import names_by_engine
from expo_ray.storage import Store, join_uri
from expo_ray.text import first_few, shown


@dataclass
class ResponsesByModel:
    """What came of asking.

    Attributes:
        answers: by served name, also where some prompts are left without an answer.
        places: where they are stored.
        failures: one text for each thing that failed.
    """

    answers: dict[str, ModelResponses] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def ask_job_models(
    job: Job, sets: Sequence[PromptSet], store: Store, client: Client, progress: Counters
) -> ResponsesByModel:
    """Ask all models of a job for what `store` lacks; the engines of different pairs and models work at the same time.

    A model that fails does not stop the others.

    Raises:
        StorageError: if responses cannot be read or written.
    """

    async def run() -> ResponsesByModel:
        done = ResponsesByModel()
        async with client:
            plan_one = partial(find_open_questions, client, sets=sets, sampling=job.sampling, store=store)
            todo = [await _plan(plan_one, names, done) for names in names_by_engine(job).values()]
            for asking in (asking for askings in todo for asking in askings):
                progress.expect(rows=len(asking.missing), kept=len(asking.present))
                done.places[asking.card.name] = join_uri(store.uri, responses_root(asking.card.name))
            busy = sum(any(asking.missing for asking in askings) for askings in todo)
            concurrency = -(-client.concurrency // max(1, busy))
            await run_all([_ask(client, askings, done, progress, concurrency) for askings in todo])
        return done

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
    """Ask one model for what a file lacks, and complete the file. Without a name, the endpoint's only model is asked.

    Raises:
        EndpointError: if the endpoint cannot be reached, or the model is not there.
        OutputError: if the file holds responses that were drawn otherwise.
        StorageError: if it cannot be read or written.
    """

    async def run() -> ResponsesByModel:
        done = ResponsesByModel()
        async with client:
            card = await client.card(name or await _only_name(client))
            questions = questions_of(card, [prompts], sampling)
            found = output.read()
            origins = {origin_of(card, one.sampling) for one in questions.values()}
            check_origins(output.uri, found, origins)
            present = {key: found[key] for key in questions if key in found}
            missing = [question for key, question in questions.items() if key not in present]
            asking = OpenQuestions(card, [prompts], present, missing, dict.fromkeys(origins, output.parts))
            progress.expect(rows=len(missing), kept=len(present))
            await _ask(client, [asking], done, progress, client.concurrency)
        answers = done.answers.get(card.name, ModelResponses(present))
        output.write(prompts)
        done.places[card.name] = output.uri
        try:
            output.export(prompts, answers.responses, sampling.samples)
        except PromptError as error:
            done.failures.append(str(error))
        return done

    return asyncio.run(run())


async def _plan(
    plan_one: Callable[[str], Awaitable[OpenQuestions]], names: Sequence[str], done: ResponsesByModel
) -> list[OpenQuestions]:
    askings = []
    for name in names:
        try:
            askings.append(await plan_one(name))
        except EndpointError as error:
            done.failures.append(f"{name}: {error}")
    return askings


async def _ask(
    client: Client,
    askings: Sequence[OpenQuestions],
    done: ResponsesByModel,
    progress: Counters,
    concurrency: int,
) -> None:
    """Ask the models of one engine, one after the other: it holds one alpha at a time."""
    failed = False
    for asking in askings:
        name = asking.card.name
        try:
            if failed:  # whether anybody is there is found out at once, without the attempts of a request
                await client.card(name)
            done.answers[name] = await answer(client, asking, progress, concurrency)
        except EndpointError as error:
            failed = True
            done.failures.append(f"{name}: {error}")
        else:
            done.failures += [f"{name}: {problem}" for problem in done.answers[name].problems]


async def _only_name(client: Client) -> str:
    names = await client.names()
    if len(names) != 1:
        remedy = "say which with --name" if names else "start one there"
        raise EndpointError(
            f"{client.url}: serves {first_few([shown(name) for name in names]) or 'no models'}; {remedy}"
        )
    return names[0]
