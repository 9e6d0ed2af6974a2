"""Responses of one model to sets of prompts: find out what is missing, ask for that alone, store it as it comes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
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
    origin_fields,
    origin_of,
    problems_of,
    put,
    sampling_of,
)
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE, Card
from expo_ray.evaluation.row_store import RowStore
from expo_ray.progress import Counters
from expo_ray.storage import Store

Key = tuple[str, int]
# A driver that is killed loses what is in flight, and at most these many answers or those of these many seconds.
PART_ROWS = 64
PART_S = 10.0


@dataclass(frozen=True)
class ModelResponses:
    """What came of asking one model.

    Attributes:
        responses: by prompt id and sample, of all that was asked now or before.
        problems: one for each set and reason, where prompts are left without an answer.
    """

    responses: Mapping[Key, Response]
    problems: tuple[ExpoError, ...] = ()


@dataclass(frozen=True)
class OpenQuestions:
    """What is still to be asked of one model.

    Attributes:
        present: responses that are there already.
        missing: the questions without one.
        parts: where responses are stored, by what decides them.
    """

    card: Card
    sets: Sequence[PromptSet]
    present: Mapping[Key, Response]
    missing: Sequence[Question]
    parts: Mapping[str, RowStore[Response]]


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
) -> ModelResponses:
    """The responses of a served model to sets of prompts; those that `store` lacks are asked for and stored.

    Args:
        url: of an OpenAI-compatible endpoint that serves `name`.
        store: the job's output; responses land in `evaluation/<name>/<responses id>/responses/`.
        slots: requests that keep the endpoint busy.
        key_variable: names the variable with its key.

    Raises:
        EndpointError: if the endpoint cannot be reached, or answers no more.
        StorageError: if responses cannot be read or written.
    """

    async def run() -> ModelResponses:
        async with Client(url, slots=slots, key_variable=key_variable) as client:
            asking = await find_open_questions(client, name, sets, sampling, store)
            progress.expect(rows=len(asking.missing), kept=len(asking.present))
            return await answer(client, asking, progress, client.concurrency)

    return asyncio.run(run())


async def find_open_questions(
    client: Client, name: str, sets: Sequence[PromptSet], sampling: Sampling, store: Store
) -> OpenQuestions:
    """What `store` lacks of a model's responses."""
    card = await client.card(name)
    questions = questions_of(card, sets, sampling)
    parts: dict[str, RowStore[Response]] = {}
    present: dict[Key, Response] = {}
    for its_sampling in dict.fromkeys(one.sampling for one in questions.values()):
        origin = origin_of(card, its_sampling)
        folder = ResponsesFolder.of(name, origin)
        about = json.dumps(origin_fields(card, its_sampling), indent=1) + "\n"
        await asyncio.to_thread(store.put_if_absent, folder.about, about.encode())
        parts[origin] = RowStore(store, folder.responses, response_from_row)
        found = await asyncio.to_thread(parts[origin].read)
        present |= {
            key: found[key] for key, one in questions.items() if one.sampling == its_sampling and key in found
        }
    missing = [question for key, question in questions.items() if key not in present]
    return OpenQuestions(card, sets, present, missing, parts)


def questions_of(card: Card, sets: Sequence[PromptSet], sampling: Sampling) -> dict[Key, Question]:
    """All that is wanted of a model; what several sets share, once."""
    return {
        (prompt.id, sample): Question(card, sampling_of(prompt, sampling), prompt, sample)
        for prompts in sets
        for prompt in prompts.prompts
        for sample in range(sampling.samples)
    }


async def answer(
    client: Client, asking: OpenQuestions, progress: Counters, concurrency: int
) -> ModelResponses:
    """Ask for what is missing, and store it in parts as it comes.

    Args:
        concurrency: requests to have in flight.

    Raises:
        EndpointError: if the endpoint answers no more; what was answered is stored.
        StorageError: if a part cannot be stored.
    """
    responses = dict(asking.present)
    unanswered: list[Unanswered] = []
    questions = iter(asking.missing)

    async with _PartWriter(asking.parts) as writer:

        async def work() -> None:
            for question in questions:
                found = await put(client, question)
                if isinstance(found, Unanswered):
                    unanswered.append(found)
                else:
                    responses[found.key] = found
                    progress.add(rows=1, tokens=found.num_tokens)
                    await writer.add(found)

        await run_all([work() for _ in range(min(concurrency, len(asking.missing)))])
    return ModelResponses(responses, problems_of(unanswered, asking.card, asking.sets))


class _PartWriter:
    """Stores responses in parts, and the rest at its end, however that comes."""

    def __init__(self, parts: Mapping[str, RowStore[Response]]) -> None:
        self._parts = parts
        self._waiting: list[Response] = []
        self._written = time.monotonic()

    async def add(self, response: Response) -> None:
        self._waiting.append(response)
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._written > PART_S:
            rows, self._waiting, self._written = self._waiting, [], time.monotonic()
            await asyncio.to_thread(self._write, rows)

    def _write(self, rows: Sequence[Response]) -> None:
        by_origin: dict[str, list[Response]] = defaultdict(list)
        for row in rows:
            by_origin[row.origin].append(row)
        for origin, its_rows in by_origin.items():
            self._parts[origin].write(its_rows)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, StorageError):  # else the same again
            self._write(self._waiting)


async def run_all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all to their end, or to the first failure, after which none is left running."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
