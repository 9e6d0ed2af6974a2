"""What is kept of an evaluation: prompts, responses and rewards, each one row of a JSONL file."""

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
    """One question.

    Attributes:
        id: digest of `messages` and `follow_ups`; the same prompt has the same id in every set.
        messages: the turns before the response, the last one of the user.
        category: stratum for drawing subsets; may be empty.
        follow_ups: further turns of the user, each asked once the turn before is answered.
        temperature: its own sampling temperature, as MT-Bench sets it by category; None for the job's.
        label: what its source calls it, such as MT-Bench's `question_id`; may be empty.
    """

    id: str
    messages: Sequence[Message]
    category: str = ""
    follow_ups: Sequence[str] = ()
    temperature: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Response:
    """One answer of one model.

    Attributes:
        prompt_id: of the `Prompt`.
        sample: 0 to `samples - 1`.
        model: name as requested, such as `zephyr-7b@0.3`.
        messages: what was asked; with follow-ups, the answers to the earlier turns among them.
        text: the answer without special tokens.
        num_tokens: generated tokens, the ending one included; of the last turn.
        num_prompt_tokens: tokens of the prompt with its template.
        finish_reason: `stop` or `length`.
        seed: of this prompt and sample, the same for every alpha.
        engine: name and version of what generated it; empty if the endpoint does not tell.
        template: digest of the chat template; likewise.
        origin: digest of all that decided it beside prompt and sample: weights, sampling, engine, template.
        num_special: special tokens before its end, which are not in `text`; 0 if the endpoint does not tell.
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
        """Names the response within the responses of one model."""
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class Reward:
    """The score of one response.

    Attributes:
        reward: raw score; no sigmoid.
        num_tokens: of prompt and response as the reward model saw them; 0 for a function.
        truncated: whether the model saw only the beginning.
        scored: digest of the turns and the text that were scored, see `scored_digest`.
    """

    prompt_id: str
    sample: int
    reward: float
    num_tokens: int = 0
    truncated: bool = False
    scored: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Names the response that it scores."""
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
    """Names what a reward is of: all turns before the response, and the response itself."""
    return digest([[[turn["role"], turn["content"]] for turn in messages], text])


def seed_of(sampling: Sampling, prompt_id: str, sample: int) -> int:
    """The sampling seed of one response: 31 bits, the same for every model and every size of the prompt set."""
    return int(digest([sampling.seed, prompt_id, sample]), 16) % 2**31
