"""Describe a judge (model, endpoint, protocol, price), and parse its answers into preferences and ratings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from expo_ray.config.fields import JudgeProtocol
from expo_ray.evaluation.records import digest

# The tokens by which AlpacaEval's template names the first and the second output.
FIRST, SECOND = "m", "M"
_OPENAI = "api.openai.com"
# Judges that reason write hundreds of tokens, some of them thousands.
_VERDICT_TOKENS = 4096
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_VERDICT = re.compile(r"\[\[\s*(A>>B|A>B|A=B|B=A|B>A|B>>A|A|B|C)\s*\]\]")
# Share of the win that goes to the second output: `>` is a smaller win than `>>`.
_SHARES = {
    "A>>B": 0.0,
    "A": 0.0,
    "A>B": 0.25,
    "A=B": 0.5,
    "B=A": 0.5,
    "C": 0.5,
    "B>A": 0.75,
    "B>>A": 1.0,
    "B": 1.0,
}
_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True)
class Price:
    """Price of a judge in dollars per million tokens, of prompts and of answers."""

    prompt: float
    answer: float

    def of(self, num_prompt_tokens: int, num_tokens: int) -> float:
        """Dollars for one request."""
        return (num_prompt_tokens * self.prompt + num_tokens * self.answer) / 1e6


@dataclass(frozen=True)
class Judge:
    """A model that judges answers, and the way to ask it.

    Attributes:
        url: of an OpenAI-compatible endpoint, with its `/v1`.
        model: its name there.
        key_variable: names the variable that holds the endpoint's key; empty for none.
        protocol: `logprobs` reads the log-probabilities of one token, as AlpacaEval 2.0 does; `verdict` lets the judge reason
            and reads its verdict.
        extra: further fields of each request, such as `chat_template_kwargs`; a field set to null is left out.
        price: used to report and limit the cost; None if unknown.
        concurrency: requests in flight.
        weights: identity of the model's weights as the endpoint gives it; empty if it gives none.
    """

    url: str
    model: str
    key_variable: str = ""
    protocol: JudgeProtocol = "logprobs"
    extra: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    concurrency: int = 16
    weights: str = ""

    @property
    def id(self) -> str:
        """Digest of everything about the judge that affects a judgment; the URL does not."""
        return digest([self.model, self.weights, self.protocol, dict(self.extra)])

    def options(self) -> dict[str, Any]:
        """Fields of a request to compare two outputs."""
        if self.protocol == "logprobs":
            # One token at temperature 1, as in AlpacaEval: log-probabilities do not depend on the temperature.
            fields = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 5}
        else:
            fields = {"max_tokens": _VERDICT_TOKENS, "temperature": 0.0}
        return self.with_extra(fields)

    def with_extra(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a request with the judge's `extra` fields over them."""
        merged = {"n": 1, "stream": False, **fields, **self.extra}
        return {name: value for name, value in merged.items() if value is not None}


def default_key_variable(url: str) -> str:
    """Default variable of the API key for `url`: OpenAI's for OpenAI, none for any other host, which must not see that key."""
    return "OPENAI_API_KEY" if urlsplit(url).hostname == _OPENAI else ""


def preference_from_logprobs(first_token: Mapping[str, float]) -> float | None:
    """Preference for the second output, 1 to 2, from the log-probabilities of the answer's first token.

    As AlpacaEval's `logprob_parser`: 2 - p(m) / (p(m) + p(M)). None if neither is among the likeliest tokens.
    """
    first, second = (_probability(first_token, name) for name in (FIRST, SECOND))
    return 2 - first / (first + second) if first + second > 0 else None


def mass_on_names(first_token: Mapping[str, float]) -> float:
    """Probability that the first token is one of the two names."""
    return _probability(first_token, FIRST) + _probability(first_token, SECOND)


def preference_from_verdict(text: str) -> float | None:
    """Preference for the second output, 1 to 2, from a judge's last verdict; None if there is none.

    A verdict is `[[A>>B]]`, `[[A>B]]`, `[[A=B]]`, `[[B>A]]`, `[[B>>A]]`, `[[A]]`, `[[B]]`, `[[C]]` (a tie), or a last line `m`
    or `M`. Thoughts between `<think>` and `</think>` do not count.
    """
    answer = _THOUGHTS.sub("", text)
    verdicts = _VERDICT.findall(answer)
    if verdicts:
        return 1 + _SHARES[verdicts[-1]]
    lines = [line.strip(" \t\r*_`\"'.") for line in answer.strip().split("\n")]
    return {FIRST: 1.0, SECOND: 2.0}.get(lines[-1])


def rating_from(text: str) -> float:
    """MT-Bench's rating of one answer: the first `[[n]]`, else the first `[n]`; -1 if there is neither (FastChat's rule)."""
    answer = _THOUGHTS.sub("", text)
    for pattern in _RATING:
        if match := pattern.search(answer):
            return float(match[1])
    return -1.0


def _probability(first_token: Mapping[str, float], name: str) -> float:
    # Some tokenizers put the space before a word into its token.
    return math.fsum(
        math.exp(logprob) for token, logprob in first_token.items() if token.strip(" ▁Ġ") == name
    )
