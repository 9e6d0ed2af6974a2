"""Check a set of answers for signs of gaming or damage, which a win rate does not show.

A constant answer once topped the leaderboard (Zheng et al., arXiv 2410.07137), and extrapolation that went too far loops, leaks
template tokens or never ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from expo_ray.evaluation.search.response_measures import repetition_of

# Two answers hardly share a beginning of this many characters by chance.
_PREFIX = 48
# Good answers may quote prompts that are shorter than this.
_SHORTEST_PROMPT = 60
# An answer repeats its prompt if it holds this share of the prompt's pieces of 24 characters.
_PIECE = 24
_MOST_OF = 0.8
# Special tokens and turn markers of the templates in use, the beginning of another turn, and a judge's verdict.
_LEAK = re.compile(
    r"<\|[A-Za-z][\w.-]{1,40}\|>|<[\uff5c][^<>]{1,40}[\uff5c]>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|"
    r"<(?:start|end)_of_turn>|\[(?:UNUSED_TOKEN|multimodal)\w*\]|(?:^|\n)### ?(?:Human|Assistant|Instruction|Response):|"
    r"(?:^|\n)(?:Human|Assistant|USER|ASSISTANT): |\[\[(?:[ABC]|[AB][>=]{1,2}[AB]|10)\]\]"
)
# A text that repeats earlier parts in half of its length is a loop; a list repeats less.
_LOOP = 0.5


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
        common_prefix: answers that share the most frequent beginning.
        common_line: answers that share the most frequent line of some length.
        prompt_overlap: answers that repeat most of their prompt, of those to prompts of some length.
        leaks: answers that contain a special token or a marker of a chat template which their prompt does not contain.
        empty: answers without a visible character.
        cut_off: answers that ended at the token limit; None if unknown.
        repetitive: answers that repeat earlier parts in at least half of their length.
        mean_length: characters.
        length_ratio: mean length over that of the reference's answers to the same prompts; None without a reference.
        flags: a sentence for each share outside its limits.
    """

    answers: int
    distinct: float
    common_prefix: float
    common_line: float
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

    Raises:
        ValueError: if there are no answers.
    """
    if not answers:
        raise ValueError("no answers to check")
    texts = [answer.text for answer in answers]
    long_prompts = [answer for answer in answers if len(answer.instruction) >= _SHORTEST_PROMPT]
    reasons = [answer.finish_reason for answer in answers if answer.finish_reason is not None]
    beginnings = Counter(text[:_PREFIX] for text in texts if len(text) >= _PREFIX)
    lines = Counter(
        line for text in texts for line in {line for line in text.split("\n") if len(line) >= _PREFIX}
    )
    shares = {
        "distinct": len(set(texts)) / len(texts),
        "common_prefix": max(beginnings.values(), default=0) / len(texts) if len(texts) > 1 else 0.0,
        "common_line": max(lines.values(), default=0) / len(texts) if len(texts) > 1 else 0.0,
        "prompt_overlap": _share(map(_repeats_prompt, long_prompts)),
        "leaks": _share(map(_leaks, answers)),
        "empty": _share(not text.strip() for text in texts),
        "repetitive": _share(repetition_of(text) > _LOOP for text in texts),
    }
    cut_off = _share(reason == "length" for reason in reasons) if reasons else None
    ratio = _length_ratio(answers, reference)
    return AnswerChecks(
        answers=len(answers),
        **shares,
        cut_off=cut_off,
        mean_length=float(np.mean([len(text) for text in texts])),
        length_ratio=ratio,
        flags=tuple(_flags(shares, cut_off, ratio)),
    )


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _repeats_prompt(answer: Answer) -> bool:
    """True if most pieces of the prompt are in the answer, ignoring white space."""
    prompt, text = (" ".join(each.split()) for each in (answer.instruction, answer.text))
    pieces = [prompt[at : at + _PIECE] for at in range(0, max(len(prompt) - _PIECE, 0) + 1, _PIECE // 2)]
    return _share(piece in text for piece in pieces) >= _MOST_OF


def _leaks(answer: Answer) -> bool:
    return any(match[0] not in answer.instruction for match in _LEAK.finditer(answer.text))


def _length_ratio(answers: Sequence[Answer], reference: Sequence[Answer]) -> float | None:
    lengths = {answer.instruction: len(answer.text) for answer in reference}
    both = [
        (len(answer.text), lengths[answer.instruction]) for answer in answers if answer.instruction in lengths
    ]
    total = sum(length for _, length in both)
    return sum(length for length, _ in both) / total if total else None


def _flags(shares: dict[str, float], cut_off: float | None, ratio: float | None) -> Iterable[str]:
    """Compare shares with limits well outside the values of sound models on AlpacaEval; a flag is a hint and no proof."""
    if shares["distinct"] < 0.95:
        yield f"only {shares['distinct']:.1%} of the answers are distinct"
    if shares["common_prefix"] > 0.1:
        yield f"{shares['common_prefix']:.1%} of the answers begin with the same {_PREFIX} characters"
    if shares["common_line"] > 0.1:
        yield f"{shares['common_line']:.1%} of the answers hold the same line of {_PREFIX} or more characters"
    if shares["prompt_overlap"] > 0.1:
        yield f"{shares['prompt_overlap']:.1%} of the answers repeat most of their prompt"
    if shares["leaks"] > 0.01:
        yield f"{shares['leaks']:.1%} of the answers hold special tokens or turn markers"
    if shares["empty"] > 0.005:
        yield f"{shares['empty']:.1%} of the answers are empty"
    if shares["repetitive"] > 0.05:
        yield f"{shares['repetitive']:.1%} of the answers go in circles"
    if cut_off is not None and cut_off > 0.05:
        yield f"{cut_off:.1%} of the answers are cut off at the token limit"
    if ratio is not None and not 0.5 <= ratio <= 1.5:
        yield f"the answers are {ratio:.2f} times as long as the reference's"
