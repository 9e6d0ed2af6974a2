"""Measures of one response whose rise over dpo is a guardrail: each is an entry of one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expo_ray.evaluation.records import Response

# Long enough that prose seldom repeats one by chance, short enough to see a loop of one word.
_REPEATED_CHARACTERS = 16


@dataclass(frozen=True)
class ResponseMeasure:
    """A measure of one response, from 0 (as it should be) to 1.

    Attributes:
        measure: takes a response and the strings that none should contain, such as the tokenizer's special tokens.
        meaning: reads on from a share, as in "5 % of responses end at the token limit".
    """

    measure: Callable[[Response, Sequence[str]], float]
    meaning: str


def is_cut(response: Response, special_tokens: Sequence[str]) -> bool:
    """True if a response ends at the token limit."""
    return response.finish_reason == "length"


def repetition(response: Response, special_tokens: Sequence[str]) -> float:
    """Share of a response's text that repeats earlier text of it."""
    return repetition_of(response.text)


def repetition_of(text: str) -> float:
    """Share of the text's runs of 16 characters that occurred before in it; 0 for a text without two of them.

    Characters, not words: a loop without spaces is one word.
    """
    runs = len(text) - _REPEATED_CHARACTERS + 1
    if runs < 2:
        return 0.0
    return 1 - len({text[at : at + _REPEATED_CHARACTERS] for at in range(runs)}) / runs


def is_broken(response: Response, special_tokens: Sequence[str]) -> bool:
    """True if a response is empty or contains a special token."""
    leaked = response.num_special or any(token in response.text for token in special_tokens)
    return bool(leaked) or not response.text.strip()


# By name of the guardrail in `expo_ray.config.guardrails`.
RESPONSE_MEASURES: Mapping[str, ResponseMeasure] = {
    "cut": ResponseMeasure(is_cut, "of responses end at the token limit"),
    "repetition": ResponseMeasure(repetition, "of the text repeats what the response said before"),
    "broken": ResponseMeasure(is_broken, "of responses are empty or contain special tokens"),
}
