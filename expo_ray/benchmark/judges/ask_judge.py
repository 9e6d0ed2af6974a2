"""Ask a judge the questions that have no stored answer, store each answer, and stay within a cost limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expo_ray.benchmark.judges.judge import Judge
from expo_ray.errors import BenchmarkError, EndpointError, ExpoError, StorageError
from expo_ray.evaluation.records import Message, digest
from expo_ray.evaluation.responses.ask_missing import run_all
from expo_ray.evaluation.responses.client import Answer, Client, GaveUp, Refused
from expo_ray.evaluation.row_store import RowStore
from expo_ray.progress import Counters
from expo_ray.storage import Store
from expo_ray.text import first_few, shown

PART_ROWS = 32
PART_S = 5.0
# Half an hour of attempts before a judge is given up: behind a rate limit it answers late.
_ATTEMPTS = 12
_TIMEOUT_S = 600.0
# Tokens of a verdict with its reasons, for estimates; a judge that thinks first may need ten times as many.
_USUAL_TOKENS = 500


@dataclass(frozen=True)
class Question:
    """A request to a judge.

    Attributes:
        id: digest of everything that affects the answer: judge, template, order and texts.
        label: name of the question in messages, such as the beginning of the instruction.
        messages: of the request.
        options: further fields of the request.
    """

    id: str
    label: str
    messages: Sequence[Message]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class JudgeAnswer:
    """A judge's answer as it came. Verdicts are parsed from it each time, so an improved parser needs no new request.

    Attributes:
        question: id of the `Question`.
        text: of the answer.
        first_token: the likeliest first tokens with their log-probabilities; empty if not requested.
        cost: dollars, by the price at that time; 0 if the price was unknown.
        attempt: number of earlier answers to the same question.
    """

    question: str
    text: str
    first_token: Mapping[str, float] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: str = ""
    cost: float = 0.0
    attempt: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Key of the row among one judge's answers."""
        return self.question, self.attempt


@dataclass(frozen=True)
class Judged:
    """The answers of one judge to a list of questions.

    Attributes:
        answers: by question id, stored ones included.
        asked: number of requests that this call got an answer to.
        cost: dollars that this call spent.
        problems: reasons why some questions have no answer.
    """

    answers: Mapping[str, JudgeAnswer]
    asked: int = 0
    cost: float = 0.0
    problems: tuple[ExpoError, ...] = ()


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of the questions without an answer: tokens from the length of the texts, dollars if the price is known."""

    requests: int
    num_prompt_tokens: int
    num_tokens: int
    cost: float | None

    def __str__(self) -> str:
        price = "" if self.cost is None else f", about ${self.cost:.2f}"
        return (
            f"{self.requests} judgment(s) to ask for, about {self.num_prompt_tokens / 1e6:.2f} M prompt and "
            f"{self.num_tokens / 1e6:.2f} M answer tokens{price}"
        )


class AnswerStore:
    """Stored answers of a judge: `judges/<judge id>/` below the output, shared by every benchmark that asks this judge."""

    def __init__(self, store: Store, judge: Judge) -> None:
        self.judge = judge
        self.store = store
        self.prefix = f"judges/{judge.id}"
        self._parts: RowStore[JudgeAnswer] = RowStore(store, f"{self.prefix}/answers", _answer_from_row)

    def read(self) -> dict[str, JudgeAnswer]:
        """Read the latest stored answer to each question, by question id."""
        rows = sorted(self._parts.read().values(), key=lambda row: row.attempt)
        return {row.question: row for row in rows}

    def write(self, rows: Sequence[JudgeAnswer]) -> None:
        """Store rows, all or none."""
        self._parts.write(rows)


def identify_judge(judge: Judge) -> Judge:
    """Ask the judge's endpoint for the identity of its weights and return the judge with it; most endpoints give none."""

    async def ask_weights() -> str:
        async with Client(judge.url, key_variable=judge.key_variable) as client:
            served = await client.card(judge.model)
            # Only our own endpoint names its engine. Other servers give a path on their disk as the root of a model.
            return served.weights if served.engine else ""

    try:
        return replace(judge, weights=asyncio.run(ask_weights()))
    except EndpointError:
        return judge  # unreachable or without a list of models; if the judge does not answer, asking it reports that


def question_id(judge: Judge, template_id: str, texts: Sequence[str], options: Mapping[str, Any]) -> str:
    """Digest of everything that affects a judgment; `texts` fill the template, in the order shown."""
    return digest([judge.id, template_id, list(texts), dict(options)], 32)


def estimate_cost(
    judge: Judge, questions: Sequence[Question], answers: Mapping[str, JudgeAnswer]
) -> CostEstimate:
    """Estimate the tokens and the cost of the questions without an answer."""
    missing = [question for question in questions if question.id not in answers]
    num_prompt_tokens = sum(_characters(question) for question in missing) // 4
    num_tokens = sum(
        min(_USUAL_TOKENS, question.options.get("max_tokens", _USUAL_TOKENS)) for question in missing
    )
    cost = judge.price.of(num_prompt_tokens, num_tokens) if judge.price else None
    return CostEstimate(len(missing), num_prompt_tokens, num_tokens, cost)


def check_cost(judge: Judge, expected: CostEstimate, max_cost: float | None) -> None:
    """Refuse, before the first request, a run whose estimated cost is above `max_cost` dollars.

    Raises:
        BenchmarkError: if it is, or the judge's price is unknown.
    """
    if max_cost is None:
        return
    if judge.price is None:
        raise BenchmarkError(
            "--max-cost needs the judge's price: give --price PROMPT ANSWER, dollars for a million tokens"
        )
    if expected.cost is not None and expected.cost > max_cost:
        raise BenchmarkError(
            f"{expected}, more than --max-cost {max_cost:g}; raise it, or judge fewer prompts with --limit"
        )


def ask_judge(
    stored: AnswerStore,
    questions: Sequence[Question],
    *,
    progress: Counters,
    max_cost: float | None = None,
    again: frozenset[str] = frozenset(),
) -> Judged:
    """Ask a judge the questions that have no stored answer, and store each answer in parts as it comes.

    Args:
        max_cost: limit in dollars, never exceeded: before each request its largest possible cost is reserved.
        again: ids of questions to ask although they have an answer.

    Raises:
        StorageError: if answers cannot be read or written.
    """
    answers = stored.read()
    missing = [
        question for question in _unique(questions) if question.id not in answers or question.id in again
    ]
    progress.expect(rows=len(missing), kept=len(questions) - len(missing))
    return asyncio.run(_Asking(stored, missing, answers, progress, max_cost).run())


class _Asking:
    """State of one call of `ask_judge`."""

    def __init__(
        self,
        stored: AnswerStore,
        missing: Sequence[Question],
        answers: dict[str, JudgeAnswer],
        progress: Counters,
        max_cost: float | None,
    ) -> None:
        self._stored, self._judge, self._missing = stored, stored.judge, missing
        self._answers, self._progress = answers, progress
        self._budget = _Budget(max_cost)
        self._waiting: list[JudgeAnswer] = []
        self._written = time.monotonic()
        self._asked = 0
        self._failed: dict[str, list[str]] = {}

    async def run(self) -> Judged:
        problems: list[ExpoError] = []
        judge = self._judge
        try:
            async with Client(
                judge.url,
                attempts=_ATTEMPTS,
                timeout_s=_TIMEOUT_S,
                concurrency=judge.concurrency,
                key_variable=judge.key_variable,
            ) as client:
                questions = iter(self._missing)
                await run_all(
                    [
                        self._work(client, questions)
                        for _ in range(min(client.concurrency, len(self._missing)))
                    ]
                )
        except EndpointError as error:
            problems.append(error)
        finally:
            self._write()
        problems += [
            EndpointError(
                f"the judge left {len(labels)} question(s) without an answer: {reason} ({first_few(labels)})"
            )
            for reason, labels in self._failed.items()
        ]
        if self._budget.stopped:
            left = sum(question.id not in self._answers for question in self._missing)
            problems.append(
                BenchmarkError(
                    f"{left} judgment(s) are left: the next could exceed --max-cost {self._budget.most:g} "
                    f"(${self._budget.spent:.4f} spent); judgments so far are stored; run again with a higher limit"
                )
            )
        return Judged(self._answers, self._asked, self._budget.spent, tuple(problems))

    async def _work(self, client: Client, questions: Any) -> None:
        for question in questions:
            reserved = self._largest_cost(question)
            if not await self._budget.reserve(reserved):
                return
            row: JudgeAnswer | None = None
            try:
                row = await self._put(client, question)
            except (Refused, GaveUp) as error:
                self._failed.setdefault(shown(error, 300), []).append(question.label)
            finally:
                await self._budget.settle(reserved, 0.0 if row is None else row.cost)
            if row is not None:
                self._answers[row.question] = row
                self._asked += 1
                self._progress.add(rows=1, tokens=row.num_tokens)
                await self._keep(row)

    async def _put(self, client: Client, question: Question) -> JudgeAnswer:
        options = dict(question.options)
        try:
            answer = await client.chat(self._judge.model, question.messages, options)
        except Refused as error:
            if not error.too_long or options.get("max_tokens", 1) == 1:
                raise
            # The prompt leaves too little room in the judge's context: ask for a shorter verdict.
            answer = await client.chat(
                self._judge.model, question.messages, {**options, "max_tokens": options["max_tokens"] // 8}
            )
        first_token = answer.top_logprobs[0] if answer.top_logprobs else {}
        if options.get("logprobs") and not first_token:
            raise EndpointError(
                f"{client.url}: {self._judge.model} returns no log-probabilities, which the protocol `logprobs` reads; "
                "use --protocol verdict"
            )
        return JudgeAnswer(
            question.id,
            answer.text,
            first_token,
            answer.num_prompt_tokens,
            answer.num_tokens,
            answer.finish_reason,
            self._cost_of(question, answer),
            self._answers[question.id].attempt + 1 if question.id in self._answers else 0,
        )

    def _cost_of(self, question: Question, answer: Answer) -> float:
        if self._judge.price is None:
            return 0.0
        if not answer.num_prompt_tokens:  # the endpoint does not count tokens: assume the largest cost
            return self._largest_cost(question)
        return self._judge.price.of(answer.num_prompt_tokens, answer.num_tokens)

    def _largest_cost(self, question: Question) -> float:
        if self._judge.price is None:
            return 0.0
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in question.messages)
        # Text has at most about one token for two bytes; chat templates add some tokens.
        return self._judge.price.of(size // 2 + 64, int(question.options.get("max_tokens", 4096)))

    async def _keep(self, row: JudgeAnswer) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._written > PART_S:
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        rows, self._waiting, self._written = self._waiting, [], time.monotonic()
        try:
            self._stored.write(rows)
        except StorageError:
            self._waiting = []  # `run` writes again on its way out, and must not repeat this failure
            raise


class _Budget:
    """Dollars spent and reserved, against a limit; None allows everything."""

    def __init__(self, most: float | None) -> None:
        self.most = float("inf") if most is None else most
        self.spent = self._reserved = 0.0
        self.stopped = False
        self._settled = asyncio.Condition()

    async def reserve(self, dollars: float) -> bool:
        """Reserve `dollars`; waits for requests in flight, which may cost less than reserved. False if the limit is reached."""
        async with self._settled:
            while self.spent + self._reserved + dollars > self.most:
                if self._reserved <= 1e-12 or self.stopped:
                    self.stopped = True
                    self._settled.notify_all()
                    return False
                await self._settled.wait()
            self._reserved += dollars
            return True

    async def settle(self, reserved: float, dollars: float) -> None:
        """Replace a reservation by the actual cost."""
        async with self._settled:
            self._reserved -= reserved
            self.spent += dollars
            self._settled.notify_all()


def _answer_from_row(row: Mapping[str, Any]) -> JudgeAnswer:
    return JudgeAnswer(**row)


def _unique(questions: Sequence[Question]) -> list[Question]:
    return list({question.id: question for question in questions}.values())


def _characters(question: Question) -> int:
    return sum(len(message["content"]) for message in question.messages)
