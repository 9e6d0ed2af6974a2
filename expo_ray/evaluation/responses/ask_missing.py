"""Ask one served model for the responses that are not stored yet, and store them while they arrive."""

from __future__ import annotations

import asyncio
import json
import time
from asyncio import FIRST_EXCEPTION
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from expo_ray.config import Sampling
from expo_ray.errors import ExpoError, StorageError
from expo_ray.evaluation.paths import ResponsesFolder
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.responses.ask_question import (
    Question,
    Unanswered,
    ask,
    origin_fields,
    origin_of,
    sampling_for,
    unanswered_errors,
)
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE, Card
from expo_ray.evaluation.row_store import RowStore
from expo_ray.interrupt import raise_if_interrupted
from expo_ray.progress import Counters
from expo_ray.storage import Store

# Prompt id and sample.
Key = tuple[str, int]
# A killed driver loses the requests in flight, and at most this many answers or the answers of this many seconds.
PART_ROWS = 64
PART_S = 10.0
# How soon a signal is noticed.
_LOOK_S = 0.5


@dataclass(frozen=True)
class ModelResponses:
    """The responses of one model.

    Attributes:
        responses: by prompt id and sample, those stored before among them.
        problems: an error for each set and reason for which prompts have no response.
        conditions: all that decided them beside the model's weights; empty where nobody asks.
    """

    responses: Mapping[Key, Response]
    problems: tuple[ExpoError, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenQuestions:
    """The questions that one model has not answered yet.

    Attributes:
        stored: responses to the other questions.
        missing: the questions without a response.
        row_stores: receive the responses, by their origin.
    """

    card: Card
    sets: Sequence[PromptSet]
    stored: Mapping[Key, Response]
    missing: Sequence[Question]
    row_stores: Mapping[str, RowStore[Response]]


def ask_model(
    url: str,
    name: str,
    sets: Sequence[PromptSet],
    sampling: Sampling,
    store: Store,
    *,
    progress: Counters,
    slots: int,
    key_variable: str = KEY_VARIABLE,
    next_name: str = "",
    again: str = "",
) -> ModelResponses:
    """Ask a served model for the responses that `store` lacks, store them, and return all of them.

    Args:
        url: of an OpenAI-compatible endpoint that serves `name`.
        store: the job's output; see `ResponsesFolder` for the place in it.
        slots: requests that keep the endpoint busy.
        key_variable: environment variable with the endpoint's key.
        next_name: the model that will probably be asked for next, if known.
        again: id of a search that asks what was answered before once more, and keeps the new responses apart.

    Raises:
        EndpointError: if the endpoint cannot be reached, or stops answering.
        StorageError: if responses cannot be read or written.
    """

    async def run() -> ModelResponses:
        async with Client(url, slots=slots, key_variable=key_variable) as client:
            client.next_models[name] = next_name
            questions = await find_open_questions(client, name, sets, sampling, store, again=again)
            progress.expect(rows=len(questions.missing), kept=len(questions.stored))
            answers = await ask_open_questions(client, questions, progress, client.concurrency)
        conditions = origin_fields(questions.card, sampling)
        del conditions["weights"]
        return replace(answers, conditions=conditions)

    return asyncio.run(run())


async def find_open_questions(
    client: Client,
    name: str,
    sets: Sequence[PromptSet],
    sampling: Sampling,
    store: Store,
    *,
    again: str = "",
) -> OpenQuestions:
    """Read a model's card and its stored responses, and record in `store` what decides its new ones; `again` as for `ask_model`.

    Raises:
        EndpointError: if the endpoint cannot be reached, or does not serve the model.
        StorageError: if responses cannot be read, or nothing can be written.
    """
    card = await client.card(name)
    questions = questions_for(card, sets, sampling)
    row_stores: dict[str, RowStore[Response]] = {}
    stored: dict[Key, Response] = {}
    # Prompts with their own temperature, as MT-Bench's, have their own origin.
    for question_sampling in dict.fromkeys(question.sampling for question in questions.values()):
        origin = origin_of(card, question_sampling)
        folder = ResponsesFolder.of(name, origin)
        about = json.dumps(origin_fields(card, question_sampling), indent=1) + "\n"
        await asyncio.to_thread(store.put_if_absent, folder.about, about.encode())
        folder = folder.again(again) if again else folder
        row_stores[origin] = RowStore(store, folder.responses, response_from_row)
        asked = [key for key, question in questions.items() if question.sampling == question_sampling]
        stored |= await asyncio.to_thread(_read_some, row_stores[origin], asked)
    missing = [question for key, question in questions.items() if key not in stored]
    return OpenQuestions(card, sets, stored, missing, row_stores)


def _read_some(row_store: RowStore[Response], keys: Sequence[Key]) -> dict[Key, Response]:
    """Read the stored responses with these keys, in their order; the texts of others would only take memory."""
    wanted = set(keys)
    rows = row_store.read(lambda row: row.key in wanted)
    return {key: rows[key] for key in keys if key in rows}


def questions_for(card: Card, sets: Sequence[PromptSet], sampling: Sampling) -> dict[Key, Question]:
    """All questions of some sets to a model; a prompt in several sets is asked once."""
    return {
        (prompt.id, sample): Question(card, sampling_for(prompt, sampling), prompt, sample)
        for prompts in sets
        for prompt in prompts.prompts
        for sample in range(sampling.samples)
    }


async def ask_open_questions(
    client: Client, questions: OpenQuestions, progress: Counters, concurrency: int
) -> ModelResponses:
    """Ask a model's open questions, many at once, and store the responses in parts while they arrive.

    Args:
        concurrency: requests to have in flight.

    Raises:
        EndpointError: if the endpoint stops answering; the responses so far are stored.
        StorageError: if a part cannot be stored.
    """
    responses = dict(questions.stored)
    unanswered: list[Unanswered] = []
    waiting = iter(questions.missing)  # shared by all workers: each takes the next question when it is free

    async with _PartWriter(questions.row_stores) as writer:

        async def work() -> None:
            for question in waiting:
                outcome = await ask(client, question)
                if isinstance(outcome, Unanswered):
                    unanswered.append(outcome)
                else:
                    responses[outcome.key] = outcome
                    progress.add(rows=1, tokens=outcome.num_tokens)
                    await writer.add(outcome)

        await run_all([work() for _ in range(min(concurrency, len(questions.missing)))])
    return ModelResponses(responses, unanswered_errors(unanswered, questions.card, questions.sets))


class _PartWriter:
    """Stores responses in parts; the last part when the context ends, even by an error."""

    def __init__(self, row_stores: Mapping[str, RowStore[Response]]) -> None:
        self._row_stores = row_stores
        self._waiting: list[Response] = []
        self._written_at = time.monotonic()

    async def add(self, response: Response) -> None:
        self._waiting.append(response)
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._written_at > PART_S:
            # Emptied before the write begins: other workers add while it runs in its thread.
            rows, self._waiting, self._written_at = self._waiting, [], time.monotonic()
            await asyncio.to_thread(self._write, rows)

    def _write(self, rows: Sequence[Response]) -> None:
        by_origin: dict[str, list[Response]] = defaultdict(list)
        for row in rows:
            by_origin[row.origin].append(row)
        for origin, rows_of_origin in by_origin.items():
            self._row_stores[origin].write(rows_of_origin)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, StorageError):  # the store would refuse this part, too
            self._write(self._waiting)


async def run_all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines until all have ended, or the first has failed; then cancel the others and wait for their end.

    Raises:
        KeyboardInterrupt: soon after a signal; the next answer may be minutes away.
    """
    tasks = [asyncio.create_task(work) for work in works]
    pending = set(tasks)
    try:
        while pending:
            raise_if_interrupted()
            done, pending = await asyncio.wait(pending, timeout=_LOOK_S, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
