"""Chat with the models of an OpenAI-compatible endpoint: many requests at once, each repeated while its failure may pass."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
from pydantic import Field

from expo_ray.errors import EndpointError
from expo_ray.evaluation.records import Message
from expo_ray.evaluation.responses.endpoint import (
    KEY_VARIABLE,
    Card,
    connect,
    connection_failure,
    failure_reason,
    get_card,
    get_model_names,
    parse_object,
    refusal,
    retry_after_s,
    send,
)
from expo_ray.serving.served_models import NEXT_MODEL
from expo_ray.text import shown
from expo_ray.untrusted import Foreign, validated

log = logging.getLogger("expo_ray")

# An answer of 2048 tokens from a busy engine on CPUs takes minutes, and arrives in one piece.
ANSWER_TIMEOUT_S = 1200.0
# With these delays a minute and a half in all: the time in which a dead replica is replaced.
ATTEMPTS = 10
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 15.0
# Requests that may fail for good, without an answer in between, before the endpoint itself is given up. A few prompts that crash an
# engine are no reason to; an endpoint that is gone should not cost `ATTEMPTS` requests for each remaining prompt.
GIVEN_UP_IN_A_ROW = 3
# For an endpoint that does not say how many requests keep it busy.
FOREIGN_SLOTS = 128
_LOG_PERIOD_S = 10.0
_TRANSIENT = {408, 409, 425, 429}
_TOO_LONG = ("context length", "context_length", "maximum model length", "max_model_len", "context window")


@dataclass(frozen=True)
class Answer:
    """An answer of a model, without its prompt.

    Attributes:
        prompt_logprobs: of the prompt's tokens after the first, if requested.
        token_ids: of the answer, including its end, if requested.
        top_logprobs: for each token of the answer, the likeliest tokens with their log-probabilities, if requested.
    """

    text: str
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: str
    prompt_logprobs: Sequence[float] = ()
    token_ids: Sequence[int] = ()
    top_logprobs: Sequence[Mapping[str, float]] = ()


class Refused(Exception):
    """The endpoint will never answer this request.

    Attributes:
        too_long: True if it does not fit into the context.
    """

    def __init__(self, reason: str, *, too_long: bool = False) -> None:
        self.too_long = too_long
        super().__init__(reason)


class GaveUp(Exception):
    """A request failed in every attempt; the endpoint may answer others."""


class Client:
    """A client of the endpoint at `url`, used as an async context manager.

    Args:
        slots: requests that keep the endpoint busy.
        attempts: of a request that fails for a reason that may pass.
        delay_s: before the second attempt; it doubles from there.
        concurrency: requests to have in flight; a quarter more than `slots` if it is 0.
        key_variable: environment variable with this endpoint's key; empty for none.

    Attributes:
        url: of the endpoint, without `/v1`.
        concurrency: requests to have in flight.
        next_models: by model, the one that will probably be asked for after it. An endpoint of expo-ray then makes its weights
            ahead; others ignore the header.
    """

    def __init__(
        self,
        url: str,
        *,
        slots: int = FOREIGN_SLOTS,
        attempts: int = ATTEMPTS,
        delay_s: float = FIRST_DELAY_S,
        timeout_s: float = ANSWER_TIMEOUT_S,
        concurrency: int = 0,
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        # A little more than the engine works on, so that the next request is there when a slot is free.
        self.concurrency = concurrency or slots + max(2, slots // 4)
        self._attempts, self._delay_s, self._timeout_s = attempts, delay_s, timeout_s
        self._key_variable = key_variable
        self.next_models: dict[str, str] = {}
        self._http = connect(url, timeout_s, key_variable)
        self.url = str(self._http.base_url)
        self._given_up, self._last_logged = 0, float("-inf")
        # Shared by all requests: each that runs into a rate limit by itself is counted against that limit.
        self._paused_until = 0.0
        self._limit_name = "max_tokens"

    async def names(self) -> list[str]:
        """Ask for the names of the models that the endpoint serves; see `get_model_names`."""
        return await get_model_names(self._http)

    async def card(self, name: str) -> Card:
        """Ask for the card of a model; see `get_card`."""
        return await get_card(self._http, name)

    async def chat(self, model: str, messages: Sequence[Message], options: Mapping[str, Any]) -> Answer:
        """Ask for the answer to a chat, again while failures may pass.

        Raises:
            Refused: if the endpoint refuses this request.
            GaveUp: if it failed each time.
            EndpointError: if the endpoint answers nothing any more, or nothing for this model or key.
        """
        body = {"model": model, "messages": list(messages), **options}
        began = time.monotonic()
        attempt = 0
        while True:
            answer, reason, wait_s = await self._attempt(body)
            if answer is not None:
                self._given_up = 0
                return answer
            # An endpoint that names a time to wait is alive: such waits are no attempts, and are bounded by time alone.
            attempt += 1 if not wait_s or not attempt else 0
            if attempt < self._attempts and time.monotonic() - began < 2 * self._timeout_s:
                self._log_failure(reason, attempt)
                delay_s = min(LONGEST_DELAY_S, self._delay_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                await asyncio.sleep(max(delay_s, wait_s))
                continue
            self._given_up += 1
            if self._given_up > GIVEN_UP_IN_A_ROW:
                raise EndpointError(
                    f"{self.url}: {reason}; asked {attempt} times, and nothing else is answered either. Earlier "
                    "answers are kept: see to the endpoint, then run the same command again"
                )
            raise GaveUp(f"{reason}; asked {attempt} times")

    async def count(self, model: str, messages: Sequence[Message]) -> tuple[int, int] | None:
        """Ask for the number of tokens of a chat with its template, and for the model's context; None where nothing counts them."""
        try:
            response = await self._http.post("/tokenize", json={"model": model, "messages": list(messages)})
            data = response.json() if response.status_code == httpx.codes.OK else {}
            return int(data["count"]), int(data["max_model_len"])
        except (httpx.TransportError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return None

    async def _attempt(self, body: Mapping[str, Any]) -> tuple[Answer | None, str, float]:
        """Send a request once. Returns the answer; or None, the reason, and the seconds that the endpoint asks to wait."""
        await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
        try:
            response = await send(
                self._http,
                "POST",
                "/v1/chat/completions",
                content=_json(self._renamed(body)),
                headers=self._headers(body["model"]),
            )
        except httpx.TransportError as error:
            return None, f"no answer ({connection_failure(error)})", 0.0
        if response.status_code in _TRANSIENT or response.status_code >= 500:
            wait_s = retry_after_s(response)
            self._paused_until = max(self._paused_until, time.monotonic() + wait_s)
            return None, f"status {response.status_code}, {failure_reason(response)}", wait_s
        if response.status_code != httpx.codes.OK:
            reason = failure_reason(response)
            if "max_completion_tokens" in reason and self._limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"  # as OpenAI's reasoning models ask for it
                return await self._attempt(body)
            raise refusal(response, self._key_variable) or Refused(
                reason, too_long=any(sign in reason for sign in _TOO_LONG)
            )
        try:
            answer = _parse_completion(response)
        except EndpointError:
            return None, f"not the answer to a chat: {shown(repr(response.text[:200]))}", 0.0
        if answer.finish_reason in {"abort", "error"}:
            return None, f"the engine broke off ({shown(answer.finish_reason)})", 0.0
        return answer, "", 0.0

    def _headers(self, model: str) -> dict[str, str]:
        following = self.next_models.get(model)
        return {"Content-Type": "application/json"} | ({NEXT_MODEL: following} if following else {})

    def _renamed(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {self._limit_name if name == "max_tokens" else name: value for name, value in body.items()}

    def _log_failure(self, reason: str, attempt: int) -> None:
        """Log a failed attempt, at most one each period: when an endpoint stops, hundreds fail at once."""
        now = time.monotonic()
        if now - self._last_logged > _LOG_PERIOD_S:
            self._last_logged = now
            log.warning("%s; asking again (attempt %d of %d)", reason, attempt + 1, self._attempts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()


def _json(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8, only an escape
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


_Tokens = Annotated[int, Field(ge=0, lt=2**40)]
# The logarithm of 0 is minus infinity.
_LogProbability = Annotated[float, Field(allow_inf_nan=True)]


class _Message(Foreign):
    content: str | None = None


class _Usage(Foreign):
    completion_tokens: _Tokens | None = None
    prompt_tokens: _Tokens | None = None


class _Logprob(Foreign):
    logprob: _LogProbability


class _TopLogprob(_Logprob):
    token: str


class _TokenLogprob(Foreign):
    top_logprobs: list[_TopLogprob] | None = None


class _Logprobs(Foreign):
    content: list[_TokenLogprob] | None = None


class _Choice(Foreign):
    message: _Message
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Completion(Foreign):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


def _parse_completion(response: httpx.Response) -> Answer:
    completion = validated(_Completion, parse_object(response), "it", error=EndpointError, remedy="")
    choice, usage = completion.choices[0], completion.usage or _Usage()
    tokens = choice.logprobs.content if choice.logprobs else None
    return Answer(
        choice.message.content or "",
        usage.completion_tokens or 0,
        usage.prompt_tokens or 0,
        choice.finish_reason or "",
        # vLLM puts the prompt's own token first, before likelier ones; the first token of a prompt has no entry.
        [next(iter(entries.values())).logprob for entries in completion.prompt_logprobs or () if entries],
        choice.token_ids or (),
        [
            {entry.token: entry.logprob for entry in token.top_logprobs}
            for token in tokens or ()
            if token.top_logprobs
        ],
    )
