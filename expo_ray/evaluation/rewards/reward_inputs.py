"""What a reward model reads: a chat as token ids, made by one function for every back end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expo_ray.errors import ExpoError, Problems, RewardError
from expo_ray.evaluation.records import Message, Response, scored_digest
from expo_ray.text import first_few
from expo_ray.time_limit import RENDER_S, time_limit

_PROBE = [{"role": "user", "content": "a"}]


class Tokenizer(Protocol):
    """What is used of a tokenizer of `transformers`."""

    chat_template: Any
    bos_token_id: int | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One response, ready to be scored.

    Attributes:
        messages: the turns before the response.
        text: the response.
        ids: the whole chat in tokens of the reward model; empty for a function.
        truncated: whether `ids` hold only the beginning.
    """

    prompt_id: str
    sample: int
    messages: Sequence[Message]
    text: str
    ids: tuple[int, ...] = ()
    truncated: bool = False

    @property
    def digest(self) -> str:
        """Names what is scored, whatever the response is called."""
        return scored_digest(self.messages, self.text)


def token_ids(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[int]:
    """The chat `messages` + response `text` in tokens of the reward model.

    The chat template alone decides on special tokens, and what it writes is tokenised as it stands: nothing is stripped from
    its end, no generation prompt follows the response, no second BOS is put before the one of the template.

    Raises:
        Exception: whatever the template raises for chats that it does not take.
    """
    chat = [{"role": one["role"], "content": one["content"]} for one in messages]
    chat.append({"role": "assistant", "content": text})
    with time_limit(RENDER_S):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def check_tokenizer(tokenizer: Tokenizer, where: str) -> list[str]:
    """True if chats of this tokenizer can be scored; notes on what a user should know.

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
            f"({type(error).__name__}: {error}); mend chat_template.jinja"
        ) from error
    if yes == no:
        raise RewardError(
            f"{where}: the chat template leaves the assistant's turn out, so that all responses would score the same; "
            "mend chat_template.jinja"
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
    """The responses in tokens, in their order.

    Args:
        where: names the reward model in errors.
        max_tokens: longest chat that the model takes.
        truncate: cut longer ones at their end; else they are refused.

    Raises:
        Problems: with every chat that cannot be scored.
    """
    inputs: list[RewardInput] = []
    too_long: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    bos = tokenizer.bos_token_id
    for one in responses:
        try:
            ids = token_ids(tokenizer, one.messages, one.text)
        except Exception as error:  # a template raises whatever it likes
            refused.setdefault(f"the chat template raised {type(error).__name__}: {error}", []).append(
                one.prompt_id
            )
            if isinstance(error, TimeoutError):
                break  # the other responses would take as long
            continue
        if bos is not None and ids[:2] == [bos, bos]:
            refused.setdefault(f"the chat begins with BOS (token {bos}) twice", []).append(one.prompt_id)
        elif not ids:
            refused.setdefault("the chat has no tokens", []).append(one.prompt_id)
        elif len(ids) > max_tokens and not truncate:
            too_long[one.prompt_id] = max(len(ids), too_long.get(one.prompt_id, 0))
        cut = len(ids) > max_tokens
        kept = tuple(ids[:max_tokens])
        inputs.append(RewardInput(one.prompt_id, one.sample, one.messages, one.text, kept, cut))
    problems: list[ExpoError] = [
        RewardError(
            f"{where}: {reason} (prompt {first_few(list(dict.fromkeys(ids)))}); remove these responses"
        )
        for reason, ids in refused.items()
    ]
    if too_long:
        shown = first_few([f"{prompt_id} with {tokens} tokens" for prompt_id, tokens in too_long.items()])
        problems.append(
            RewardError(
                f"{where}: the chats of {len(too_long)} prompt(s) are longer than the {max_tokens} tokens that the model takes ({shown}); "
                "set `truncate: true` to score their beginnings, which are counted, or take a reward model with a "
                "longer context"
            )
        )
    if problems:
        raise Problems(problems)
    return inputs


def function_inputs(responses: Sequence[Response]) -> list[RewardInput]:
    """The responses for a function, in their order."""
    return [RewardInput(one.prompt_id, one.sample, one.messages, one.text) for one in responses]


def parse_response(data: Mapping[str, Any]) -> Response:
    """A `Response` from one row of a file; what only tells how it was made may be missing.

    Raises:
        ValueError: naming the field that is missing or of another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError("is no object with `prompt_id`, `messages` and `text`")
    messages = data.get("messages")
    turns = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not messages or not turns:
        raise ValueError("`messages` is no list of turns with `role` and `content`")
    for name in ("prompt_id", "text", "sample"):
        if name not in data:
            raise ValueError(f"`{name}` is missing")
    for name, info in Response.__dataclass_fields__.items():
        kind = int if info.type == "int" else str
        if name != "messages" and name in data and type(data[name]) is not kind:
            raise ValueError(f"`{name}` is no {kind.__name__}")
    if data["sample"] < 0:
        raise ValueError("`sample` is below 0")
    known: dict[str, Any] = {name: data[name] for name in Response.__dataclass_fields__ if name in data}
    unknown: dict[str, Any] = {
        "model": "",
        "num_tokens": 0,
        "num_prompt_tokens": 0,
        "finish_reason": "",
        "seed": 0,
    }
    return Response(**unknown | known)
