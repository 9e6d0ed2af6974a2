"""Prompts, responses and rewards: the rows that an evaluation stores, and the digests that identify them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.config import Sampling

# One turn of a chat: `role` and `content`, as in OpenAI's API.
Message = Mapping[str, str]


def digest(data: object, length: int = 16) -> str:
    """Hex digest of plain data; the same for equal data, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


@dataclass(frozen=True)
class Prompt:
    """A question, of one turn or several.

    Attributes:
        id: digest of `messages` and `follow_ups`; the same prompt has the same id in every set.
        messages: the turns before the response, the last one of the user.
        category: stratum for drawing subsets; may be empty.
        follow_ups: further turns of the user, each asked after the turn before is answered.
        temperature: the prompt's own sampling temperature, as MT-Bench sets it by category; None for the job's.
        label: name in its source, such as MT-Bench's `question_id`; may be empty.
    """

    id: str
    messages: Sequence[Message]
    category: str = ""
    follow_ups: Sequence[str] = ()
    temperature: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Response:
    """An answer of a model to a prompt.

    Attributes:
        prompt_id: of the `Prompt`.
        sample: 0 to `samples - 1`.
        model: name as requested, such as `zephyr-7b@0.3`.
        messages: all turns before the answer; with follow-ups, also the answers to the earlier ones.
        text: the answer without special tokens.
        num_tokens: generated tokens of the last turn, including the one that ends it.
        num_prompt_tokens: tokens of the prompt with its template.
        finish_reason: `stop` or `length`.
        seed: of this prompt and sample, the same for every alpha.
        engine: name and version of the program that generated it; empty if the endpoint does not say.
        template: digest of the chat template; empty likewise.
        origin: digest of everything else that decided the answer: weights, sampling, engine, template.
        num_special: special tokens before its end, which are not in `text`; 0 if the endpoint does not say.
    """

    prompt_id: str
    sample: int
    model: str
    messages: Sequence[Message]
    text: str
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: str
    seed: int
    engine: str = ""
    template: str = ""
    origin: str = ""
    num_special: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and sample, which identify the response among those of one model."""
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class Reward:
    """The score of one response.

    Attributes:
        reward: raw score: no sigmoid is applied, which would put half of them above .9999.
        num_tokens: tokens of prompt and response that the reward model read; 0 for a function.
        truncated: True if the model read only the beginning.
        scored: `scored_digest` of the turns and the text that were scored.
    """

    prompt_id: str
    sample: int
    reward: float
    num_tokens: int = 0
    truncated: bool = False
    scored: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and sample of the response."""
        return self.prompt_id, self.sample


def response_from_row(row: Mapping[str, Any]) -> Response:
    """Make a `Response` from its stored row; the inverse of `dataclasses.asdict`."""
    return Response(**{**row, "messages": tuple(row["messages"])})


def reward_from_row(row: Mapping[str, Any]) -> Reward:
    """Make a `Reward` from its stored row.

    Raises:
        TypeError, ValueError: if the row is not a reward.
    """
    reward = Reward(**row)
    if not isinstance(reward.prompt_id, str) or not math.isfinite(reward.reward):
        raise ValueError("no finite `reward` of a `prompt_id`")
    return reward


def scored_digest(messages: Sequence[Message], text: str) -> str:
    """Digest of what a reward depends on: all turns before the response, and its text."""
    return digest([[[turn["role"], turn["content"]] for turn in messages], text])


def seed_of(sampling: Sampling, prompt_id: str, sample: int) -> int:
    """The sampling seed of one response, of 31 bits.

    It depends on neither the model nor the other prompts. Every alpha thus draws with the same random numbers, so that the
    difference of two alphas on a prompt is less noisy than either answer, and a larger set only adds rows.
    """
    return int(digest([sampling.seed, prompt_id, sample]), 16) % 2**31
