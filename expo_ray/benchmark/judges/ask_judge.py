"""Questions to a judge: ask for the answers that are not stored yet, store them as they come, and stay within a cost."""

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
# A judge behind a rate limit answers late, not never: half an hour of attempts before it is given up.
_ATTEMPTS = 12
_TIMEOUT_S = 600.0
# Of a verdict with its reasons, for estimates; a judge that thinks first may need ten times as many.
_USUAL_TOKENS = 500


@dataclass(frozen=True)
class Question:
    """A request to a judge.

    Attributes:
        id: digest of all that decides the answer: judge, template, order and texts.
        label: names it in messages, such as the beginning of the instruction.
        messages: what is sent.
        options: fields of the request beside model and messages.
    """

    id: str
    label: str
    messages: Sequence[Message]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class JudgeAnswer:
    """A judge's answer, raw: every number is read from it again, so a better reader needs no new request.

    Attributes:
        question: id of the `Question`.
        text: as it came.
        first_token: the likeliest first tokens with their log-probabilities; empty if they were not asked for.
        cost: dollars, by the price known then; 0 if none was.
        attempt: 0, or how often the question had been answered before it was asked again.
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
        """Names the row within one judge's answers."""
        return self.question, self.attempt


@dataclass(frozen=True)
class Judged:
    """The answers of one judge to a list of questions.

    Attributes:
        answers: by question id, of all that was asked now or before.
        asked: requests answered now.
        cost: dollars spent now.
        problems: why some questions have no answer.
    """

    answers: Mapping[str, JudgeAnswer]
    asked: int = 0
    cost: float = 0.0
    problems: tuple[ExpoError, ...] = ()


@dataclass(frozen=True)
class CostEstimate:
    """The questions that are still to be asked, and their price: tokens by the length of the texts, dollars if the price is known."""

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
    """Where one judge's answers are stored: `judges/<judge id>/` below the output, shared by every benchmark that asks it."""

    def __init__(self, store: Store, judge: Judge) -> None:
        self.judge = judge
        self.store = store
        self.prefix = f"judges/{judge.id}"
        self._parts: RowStore[JudgeAnswer] = RowStore(store, f"{self.prefix}/answers", _answer_from_row)

    def read(self) -> dict[str, JudgeAnswer]:
        """Read the last stored answer to each question, by question id."""
        rows = sorted(self._parts.read().values(), key=lambda row: row.attempt)
        return {row.question: row for row in rows}

    def write(self, rows: Sequence[JudgeAnswer]) -> None:
        """Store rows, all or none."""
        self._parts.write(rows)


def identify_judge(judge: Judge) -> Judge:
    """Ask the judge's endpoint which weights it serves, and make them part of the judge; most endpoints do not say."""

    async def ask_card() -> str:
        async with Client(judge.url, key_variable=judge.key_variable) as client:
            card = await client.card(judge.model)
            # What other servers call the root of a model is a path on their disk.
            return card.weights if card.engine else ""

    try:
        return replace(judge, weights=asyncio.run(ask_card()))
    except EndpointError:
        return judge  # not there, or no list of models; whether it answers is seen when it is asked


def question_id(judge: Judge, template_id: str, texts: Sequence[str], options: Mapping[str, Any]) -> str:
    """Digest of all that decides a judgment; `texts` are what fills the template, in the order shown."""
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
    """Refuse, before the first call, what would cost more than `max_cost` dollars.

    Raises:
        BenchmarkError: naming the estimate.
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
        max_cost: dollars that are never passed: before each request its largest possible cost is set aside.
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
    """A call of `ask_judge`."""

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
                    f"{left} judgment(s) are left: the next could pass --max-cost {self._budget.most:g} "
                    f"(${self._budget.spent:.4f} spent); what was judged is kept, run again with a higher one"
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
            # A verdict that has to be shorter is better than none.
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
        if not answer.num_prompt_tokens:  # an endpoint that counts no tokens: the most that it can have been
            return self._largest_cost(question)
        return self._judge.price.of(answer.num_prompt_tokens, answer.num_tokens)

    def _largest_cost(self, question: Question) -> float:
        if self._judge.price is None:
            return 0.0
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in question.messages)
        # Hardly a text has more than one token for two bytes; templates add some.
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
            self._waiting = []  # not tried a second time on the way out
            raise


class _Budget:
    """Dollars spent and set aside; without a limit it lets everything pass."""

    def __init__(self, most: float | None) -> None:
        self.most = float("inf") if most is None else most
        self.spent = self._reserved = 0.0
        self.stopped = False
        self._settled = asyncio.Condition()

    async def reserve(self, dollars: float) -> bool:
        """Set `dollars` aside, waiting for requests in flight to turn out cheaper; False if they do not fit."""
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
        """Replace what was set aside by what it came to."""
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
