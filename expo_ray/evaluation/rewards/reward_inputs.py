"""Inputs of a reward model, tokenised by one function for every back end, and the reward or failure that each comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expo_ray.errors import ExpoError, Problems, RewardError
from expo_ray.evaluation.records import Message, Response, Reward, scored_digest
from expo_ray.text import first_few
from expo_ray.time_limit import RENDER_S, time_limit

_PROBE = [{"role": "user", "content": "a"}]


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that is used here."""

    chat_template: Any
    bos_token_id: int | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class ScoreFailure:
    """A response without a reward, and the error that left it without."""

    prompt_id: str
    sample: int
    error: str

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and sample of the response."""
        return self.prompt_id, self.sample


@dataclass(frozen=True, slots=True)
class RewardInput:
    """A response, ready to be scored.

    Attributes:
        messages: the turns before the response.
        text: the response.
        ids: the whole chat in tokens of the reward model; empty for a function.
        truncated: True if `ids` hold only the beginning.
    """

    prompt_id: str
    sample: int
    messages: Sequence[Message]
    text: str
    ids: tuple[int, ...] = ()
    truncated: bool = False

    @property
    def digest(self) -> str:
        """Identifies the content that is scored; see `scored_digest`."""
        return scored_digest(self.messages, self.text)

    def scored(self, score: float, source: str) -> Reward | ScoreFailure:
        """The reward of this response; a failure if `score` is NaN or infinite.

        Args:
            source: URI of the model or function that gave the score.
        """
        if not math.isfinite(score):
            return ScoreFailure(
                self.prompt_id, self.sample, f"{source} returned {score}; a reward must be finite"
            )
        return Reward(self.prompt_id, self.sample, score, len(self.ids), self.truncated, self.digest)


def token_ids(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[int]:
    """The chat `messages` + response `text` in tokens of the reward model.

    The chat template alone decides on special tokens, and its text is tokenised unchanged. Measured on trained reward models: a
    second BOS, or none, moves scores by 5 to 6; with a generation prompt after the response, scores correlate 0.43 with the right
    ones; without the template, or with its last newline stripped, 0.

    Raises:
        Exception: any, if the template refuses the chat.
    """
    chat = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    chat.append({"role": "assistant", "content": text})
    with time_limit(RENDER_S):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def check_tokenizer(tokenizer: Tokenizer, where: str) -> list[str]:
    """Check that chats in this tokenizer's template can be scored; returns notes for the user.

    Raises:
        RewardError: if it has no chat template, one that does not show the response, or one that writes BOS twice.
    """
    if not tokenizer.chat_template:
        raise RewardError(
            f"{where}: the tokenizer has no chat template, and scores without the one of its training mean nothing; save it with "
            "the model (`chat_template.jinja`, or `chat_template` in tokenizer_config.json)"
        )
    try:
        yes, no = (token_ids(tokenizer, _PROBE, text) for text in ("yes", "no"))
    except Exception as error:
        raise RewardError(
            f"{where}: the chat template fails on a turn of the user and one of the assistant "
            f"({type(error).__name__}: {error}); correct chat_template.jinja"
        ) from error
    if yes == no:
        raise RewardError(
            f"{where}: the chat template leaves the assistant's turn out, so that all responses would score the same; "
            "correct chat_template.jinja"
        )
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    if yes[:2] == [bos, bos]:
        raise RewardError(
            f"{where}: the chat template begins with BOS (token {bos}) twice, which shifts all scores; leave one in "
            "chat_template.jinja"
        )
    adds_bos = list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1] == [bos]
    if adds_bos and yes[:1] != [bos]:
        return [
            f"{where}: the tokenizer puts BOS (token {bos}) before plain texts, the chat template writes none; scored without, as "
            "`apply_chat_template` does. If the model was trained with it, begin chat_template.jinja with {{ bos_token }}"
        ]
    return []


def model_inputs(
    responses: Sequence[Response],
    tokenizer: Tokenizer,
    *,
    where: str,
    max_tokens: int,
    truncate: bool,
) -> list[RewardInput]:
    """Turn responses into tokens, in their order.

    Args:
        where: name of the reward model in errors.
        max_tokens: longest chat that the model takes.
        truncate: cut longer chats at their end, and count them: scores of cut chats correlate only 0.6 to 0.8 with those of whole
            ones. Else they are refused.

    Raises:
        Problems: with every chat that cannot be scored.
    """
    inputs: list[RewardInput] = []
    too_long: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    for response in responses:
        try:
            ids = token_ids(tokenizer, response.messages, response.text)
        except Exception as error:  # a template may raise anything
            reason = f"the chat template raised {type(error).__name__}: {error}"
            refused.setdefault(reason, []).append(response.prompt_id)
            if isinstance(error, TimeoutError):
                break  # the other responses would take as long
            continue
        if reason := _fault_of(ids, tokenizer.bos_token_id):
            refused.setdefault(reason, []).append(response.prompt_id)
        elif len(ids) > max_tokens and not truncate:
            too_long[response.prompt_id] = max(len(ids), too_long.get(response.prompt_id, 0))
        inputs.append(
            RewardInput(
                response.prompt_id,
                response.sample,
                response.messages,
                response.text,
                ids=tuple(ids[:max_tokens]),
                truncated=len(ids) > max_tokens,
            )
        )
    if problems := _problems_of_chats(where, refused, too_long, max_tokens):
        raise Problems(problems)
    return inputs


def _fault_of(ids: Sequence[int], bos: int | None) -> str:
    """Reason why a chat would be scored wrongly; empty if it has none."""
    if bos is not None and ids[:2] == [bos, bos]:
        return f"the chat begins with BOS (token {bos}) twice"
    return "" if ids else "the chat has no tokens"


def _problems_of_chats(
    where: str, refused: Mapping[str, Sequence[str]], too_long: Mapping[str, int], max_tokens: int
) -> list[ExpoError]:
    """An error for each reason, with its prompts, and one for all chats that are too long."""
    problems: list[ExpoError] = []
    for reason, prompt_ids in refused.items():
        prompts = first_few(list(dict.fromkeys(prompt_ids)))
        problems.append(RewardError(f"{where}: {reason} (prompt {prompts}); remove these responses"))
    if too_long:
        lengths = first_few([f"{prompt_id} with {tokens} tokens" for prompt_id, tokens in too_long.items()])
        problems.append(
            RewardError(
                f"{where}: the chats of {len(too_long)} prompt(s) are longer than the {max_tokens} tokens that the model takes ({lengths}); "
                "set `truncate: true` to score their beginnings, which are counted, or take a reward model with a "
                "longer context"
            )
        )
    return problems


def function_inputs(responses: Sequence[Response]) -> list[RewardInput]:
    """Inputs of a function, in the order of the responses; no tokens are needed."""
    return [
        RewardInput(response.prompt_id, response.sample, response.messages, response.text)
        for response in responses
    ]
