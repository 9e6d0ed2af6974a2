"""Make a prompt of a row, in each of the forms in which sets of prompts come. A row is asked whole, or refused."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from expo_ray.evaluation.prompts.prompt_set import prompt_of
from expo_ray.evaluation.records import Message, Prompt
from expo_ray.text import shown

# FastChat's `temperature_config`: results of MT-Bench are comparable only at these temperatures.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip

_ROLES = ("system", "user", "assistant")
_FORMS = "`prompt`, `messages`, `instruction` (Alpaca) or `turns` (MT-Bench)"
# Columns whose text belongs to an `instruction`: Alpaca's and Dolly's.
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_ASKED = ("prompt", "messages", "instruction", "turns", "history", *_INPUTS, *_SYSTEMS)
# Columns that are part of the question in some data set, and no form says where in the prompt they belong. A row with one of them
# is refused: asked without it, the question would be another, and nobody would notice.
_PARTS = frozenset(
    [
        "question",
        "query",
        "passage",
        "passages",
        "paragraph",
        "document",
        "documents",
        "doc",
        "docs",
        "article",
        "story",
        "text_input",
        "code_context",
        "table",
        "tables",
        "schema",
        "option",
        "options",
        "choice",
        "choices",
        "hypothesis",
        "premise",
        "sentence1",
        "sentence2",
        "images",
        "image",
        "audio",
        "audios",
        "video",
        "videos",
        "tools",
        "functions",
        "knowledge",
        "background",
        "evidence",
        "reference_document",
        "examples",
        "few_shot",
        "demonstrations",
        "dialogue",
        "dialog",
        "inputs",
        "contexts",
        "source_text",
        "src",
        "persona",
        "file",
        "files",
    ]
)
# `option_a`, `passage2`
_NUMBERED = re.compile(r"(?:[_\-. ]?[0-9]+|[_\-. ][a-z])$")
# Columns that are not asked: answers, and notes about the row.
IGNORED = frozenset(
    [
        "output",
        "outputs",
        "response",
        "responses",
        "completion",
        "completions",
        "chosen",
        "rejected",
        "answer",
        "answers",
        "label",
        "labels",
        "target",
        "targets",
        "reference",
        "references",
        "solution",
        "ground_truth",
        "generator",
        "model",
        "models",
        "model_name",
        "dataset",
        "datasplit",
        "source",
        "category",
        "type",
        "task",
        "subject",
        "language",
        "lang",
        "id",
        "idx",
        "index",
        "uid",
        "uuid",
        "prompt_id",
        "question_id",
        "row_id",
        "conversation_id",
        "conv_id",
        "conversation_hash",
        "score",
        "scores",
        "score_chosen",
        "score_rejected",
        "chosen_score",
        "rejected_score",
        "rating",
        "ratings",
        "margin",
        "reward",
        "rewards",
        "split",
        "url",
        "license",
        "difficulty",
        "level",
        "tags",
        "meta",
        "metadata",
        "info",
        "extra_info",
        "data_source",
        "ability",
        "reward_model",
        "created_at",
        "timestamp",
        "num_tokens",
        "length",
        "quality",
        "conversation",
        "conversations",
    ]
)


def parse_prompt(row: Any) -> Prompt:
    """Make the prompt of a row.

    Alpaca's `input` and Dolly's `context` follow the instruction after an empty line. `system` comes first, then the pairs of
    `history`, then the question.

    Raises:
        ValueError: naming the fault of the row, or its columns that would not be asked.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"holds {type(row).__name__}; a row is an object with {_FORMS}")
    category = _optional_text(row, "category" if "category" in row else "dataset")
    empty = [name for name in ("prompt", "instruction") if row.get(name) is not None and _is_empty(row[name])]
    row = {
        name: value for name, value in row.items() if name in {"turns", "messages"} or not _is_empty(value)
    }
    if "turns" in row:
        prompt = _mt_bench_prompt(row, category)
        _check_whole(row, [*prompt.messages, *map(_user, prompt.follow_ups)], "turns")
        return prompt
    asked = _asked(row)
    if not asked and empty:
        raise ValueError(f"`{empty[0]}` is empty")
    if not asked:
        raise ValueError(
            f"has none of {_FORMS}; its keys are {', '.join(_value(key) for key in [*row][:20]) or 'none'}"
        )
    if asked[-1]["role"] != "user":
        raise ValueError(f"ends with a turn of role {asked[-1]['role']!r}; the last one must be the user's")
    whole = [*_before(row, asked), *asked]
    _check_whole(
        row, whole, next(name for name in ("prompt", "instruction", "messages", "chosen") if name in row)
    )
    return prompt_of(whole, category, label=_label(row))


def unasked(row: Any) -> dict[str, str]:
    """The texts of a row, by column, that are neither asked nor known to be answers or notes."""
    known = {*_ASKED, *IGNORED}
    return {
        name: text
        for name, text in (row.items() if isinstance(row, Mapping) else ())
        if isinstance(name, str)
        and isinstance(text, str)
        and len(text.split()) > 1  # a single word is a name or a number
        and name.lower() not in known
    }


def _asked(row: Mapping[str, Any]) -> list[Message]:
    """The turns of `prompt`, `instruction` or `messages`, or those that `chosen` and `rejected` share."""
    messages = _messages(row["messages"], "messages") if row.get("messages") is not None else []
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        asked = _messages(prompt, "prompt") if isinstance(prompt, list) else [_user(_text(prompt, "prompt"))]
    elif row.get("instruction") is not None:
        inputs = [name for name in _INPUTS if name in row]
        if len(inputs) > 1:
            raise ValueError("has both `input` and `context` beside `instruction`; put one into the other")
        parts = [_text(row[name], name) for name in ("instruction", *inputs)]
        asked = [_user("\n\n".join(parts))]
    elif not messages and "chosen" in row and "rejected" in row:
        return _shared(row["chosen"], row["rejected"])
    else:
        return messages
    # UltraFeedback has both: `prompt` is the question, `messages` begins with it and ends with an answer.
    if messages and (messages[: len(asked)] != asked or messages[-1]["role"] != "assistant"):
        raise ValueError("has both `prompt` and `messages`, and they differ; keep one of them")
    return asked


def _shared(chosen: Any, rejected: Any) -> list[Message]:
    """The question of two dialogues that differ in the answer, as in TRL's preferences without a prompt."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError(
            "has `chosen` and `rejected` as texts, and no `prompt`; write the question into `prompt`"
        )
    turns = zip(_messages(chosen, "chosen"), _messages(rejected, "rejected"), strict=False)
    shared = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], turns)]
    if not shared:
        raise ValueError(
            "has `chosen` and `rejected` that share no turn, and no `prompt`; write the question into `prompt`"
        )
    return shared


def _before(row: Mapping[str, Any], asked: Sequence[Message]) -> list[Message]:
    """The turns of `system` and `history`."""
    before: list[Message] = []
    for name in _SYSTEMS:
        if _is_empty(row.get(name)):
            continue
        turn: Message = {"role": "system", "content": _text(row[name], name)}
        if turn in (*before, asked[0]):
            continue
        if before or any(message["role"] == "system" for message in asked):
            raise ValueError(f"has `{name}` beside another system turn; keep one of them")
        before.append(turn)
    history = row.get("history")
    if _is_empty(history):
        return before
    if len(asked) > 1 or not isinstance(history, list):
        raise ValueError(
            f"`history` is {_value(history)}; it must be a list of pairs of texts before one question"
        )
    for place, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history[{place}] is {_value(pair)}; it must be a question and its answer")
        texts = [_text(text, f"history[{place}]") for text in pair]
        before += [_user(texts[0]), {"role": "assistant", "content": texts[1]}]
    return before


def _check_whole(row: Mapping[str, Any], asked: Sequence[Message], form: str) -> None:
    """Refuse a row that has parts of the question outside the turns that are asked.

    Raises:
        ValueError: naming those columns.
    """
    text = "\n".join(turn["content"] for turn in asked)
    known = {*_PARTS, *_INPUTS, *_SYSTEMS, "history", "instruction", "prompt"} - {form}
    left_out = [
        name
        for name, value in row.items()
        if isinstance(name, str)
        and _NUMBERED.sub("", name.lower()) in known
        and not (name == "history" and len(asked) > 1)
        and not (isinstance(value, str) and value.strip() in text)
    ]
    if left_out:
        names = ", ".join(f"`{shown(name)}`" for name in left_out)
        raise ValueError(
            f"has {names} beside `{form}`, which would not be asked; put all that is asked into `{form}`, or remove {names}"
        )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _mt_bench_prompt(row: Mapping[str, Any], category: str) -> Prompt:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"`turns` is {_value(turns)}; it must be a list of texts")
    first, *others = (_text(turn, f"turns[{place}]") for place, turn in enumerate(turns))
    return prompt_of(
        [{"role": "user", "content": first}],
        category,
        follow_ups=others,
        temperature=MT_BENCH_TEMPERATURES.get(category),
        label=_label(row),
    )


def _messages(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f"`{name}` is {_value(turns)}; it must be a list of turns, each with `role` and `content`"
        )
    messages: list[Message] = []
    for place, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, Mapping) else turn
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"{name}[{place}] has the role {_value(role)}; a turn has `role` and `content`, and known roles are "
                f"{', '.join(_ROLES)}"
            )
        messages.append({"role": role, "content": _text(turn.get("content"), f"{name}[{place}].content")})
    return messages


def _label(row: Mapping[str, Any]) -> str:
    label = row.get("question_id")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes integers as floats in a column with gaps
    if label is None or label == "":
        return ""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"`question_id` is {_value(label)}; it must be a number or a text")
    return _text(str(label), "question_id")


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    if _is_empty(row.get(name)):
        return ""
    return _text(row[name], name)


def _is_empty(value: Any) -> bool:
    return value is None or value in ([], {}, ()) or (isinstance(value, str) and not value.strip())


def _value(value: Any) -> str:
    """A value as an error shows it, cut before it becomes a text: a row may hold megabytes."""
    return shown(reprlib.repr(value), 100)


def _text(value: Any, name: str) -> str:
    """`value`, if it is a text that can be asked.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {_value(value)}; it must be a text")
    if not value.strip():
        raise ValueError(f"`{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` holds half a surrogate pair at character {error.start}; its text is broken"
        ) from None
    return value
