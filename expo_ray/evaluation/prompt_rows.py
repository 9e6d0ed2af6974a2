"""One row of a prompt file, in each form that sets of prompts come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expo_ray.evaluation.prompts import prompt_of
from expo_ray.evaluation.records import Message, Prompt

# FastChat's `temperature_config`: MT-Bench's results are comparable at these alone.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip

_ROLES = ("system", "user", "assistant")
_FORMS = "`prompt`, `messages`, `instruction` (AlpacaEval) or `turns` (MT-Bench)"


def parse_prompt(row: Any) -> Prompt:
    """The prompt of a row.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"holds {type(row).__name__}; a row is an object with {_FORMS}")
    category = row.get("category", row.get("dataset"))
    if not isinstance(category, str | None):
        raise ValueError(f"`category` is {category!r}; it must be a text")
    category = category or ""
    if "turns" in row:
        return _mt_bench(row, category)
    messages = _messages(row["messages"]) if row.get("messages") is not None else []
    text = row.get("prompt") if row.get("prompt") is not None else row.get("instruction")
    if text is not None:
        asked: Message = {
            "role": "user",
            "content": _text(text, "prompt" if "prompt" in row else "instruction"),
        }
        # UltraFeedback has both: the question, and the dialogue that begins with it and ends with an answer.
        if messages and (messages[0] != asked or messages[-1]["role"] != "assistant"):
            raise ValueError("has both `prompt` and `messages`, and they differ; keep one of them")
        messages = [asked]
    if not messages:
        raise ValueError(f"has none of {_FORMS}; its keys are {', '.join(map(repr, row)) or 'none'}")
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"`messages` end with a turn of role {messages[-1]['role']!r}; the last one must be the user's"
        )
    return prompt_of(messages, category, label=_label(row))


def _mt_bench(row: Mapping[str, Any], category: str) -> Prompt:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"`turns` is {turns!r}; it must be a list of texts")
    first, *others = (_text(turn, f"turns[{place}]") for place, turn in enumerate(turns))
    return prompt_of(
        [{"role": "user", "content": first}],
        category,
        follow_ups=others,
        temperature=MT_BENCH_TEMPERATURES.get(category),
        label=_label(row),
    )


def _messages(found: Any) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise ValueError(
            f"`messages` is {found!r}; it must be a list of turns, each with `role` and `content`"
        )
    messages: list[Message] = []
    for place, turn in enumerate(found):
        if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES:
            role = turn.get("role") if isinstance(turn, Mapping) else turn
            raise ValueError(f"messages[{place}] has the role {role!r}; known roles are {', '.join(_ROLES)}")
        messages.append(
            {"role": turn["role"], "content": _text(turn.get("content"), f"messages[{place}].content")}
        )
    return messages


def _label(row: Mapping[str, Any]) -> str:
    return str(row.get("question_id", ""))


def _text(found: Any, name: str) -> str:
    """`found` itself, if it can be asked."""
    if not isinstance(found, str):
        raise ValueError(f"`{name}` is {found!r}; it must be a text")
    if not found.strip():
        raise ValueError(f"`{name}` is empty")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` holds half a surrogate pair at character {error.start}; its text is broken"
        ) from None
    return found
