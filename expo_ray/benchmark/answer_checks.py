"""Signs of gaming or damage in a set of answers, that a win rate does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    Attributes:
        instruction: the prompt.
        text: the answer.
        finish_reason: `length` if it was cut off at the token limit; None if unknown.
    """

    instruction: str
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class AnswerChecks:
    """Shares of a set of answers, from 0 to 1, unless said otherwise.

    Attributes:
        answers: how many there are.
        distinct: different answers over answers; 1 if each differs.
        common_prefix: answers that begin with the most frequent beginning.
        prompt_overlap: answers that repeat most of their prompt.
        leaks: answers with a special token or a chat template's marker in them.
        empty: answers without a visible character.
        cut_off: answers that ended at the token limit; None if unknown.
        repetitive: answers in which a passage comes again and again.
        mean_length: characters.
        length_ratio: mean length over that of the reference's answers to the same prompts; None without a reference.
        flags: each share that calls for a look, as a sentence with its value.
    """

    answers: int
    distinct: float
    common_prefix: float
    prompt_overlap: float
    leaks: float
    empty: float
    cut_off: float | None
    repetitive: float
    mean_length: float
    length_ratio: float | None
    flags: tuple[str, ...]


def check_answers(answers: Sequence[Answer], reference: Sequence[Answer] = ()) -> AnswerChecks:
    """Check a set of answers.

    Args:
        answers: of one model, at least one.
        reference: another model's answers, such as dpo's or the baseline's, placed by instruction.
    """
    raise NotImplementedError
