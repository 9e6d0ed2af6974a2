"""The files of `expo-ray reward` without a job: responses in, rewards out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from expo_ray.errors import NotFound, OutputError, RewardError
from expo_ray.evaluation.records import Response, Reward, reward_from_row
from expo_ray.evaluation.row_store import read_rows, rows_text
from expo_ray.storage import Store, open_output_file, open_store, split_file
from expo_ray.text import first_few


class RewardFile:
    """A JSONL file of rewards, in the order of the responses, and beside it `<file>.about.json` on what made them.

    It is replaced as a whole, so that no reader sees half a row.

    Args:
        order: keys of the responses.
        about: description of what makes the rewards; a file that was made by something else is refused.

    Raises:
        OutputError: if the file holds something else, or cannot be written.
        StorageError: if `uri` names no file, or it cannot be read.
    """

    def __init__(self, uri: str, order: Iterable[Hashable], about: Mapping[str, Any]) -> None:
        self._store, self._key = open_output_file(uri)
        self._order = {key: place for place, key in enumerate(order)}
        self._about = (json.dumps(about, indent=1) + "\n").encode()
        self._rows: dict[Hashable, Reward] = {}
        if (present := _read_if_present(self._store, self._key)) is None:
            return
        if _read_if_present(self._store, f"{self._key}.about.json") != self._about:
            origin = (
                "of other responses, another reward model or other settings" if present else "that is empty"
            )
            raise OutputError(
                f"{uri}: there is a file already, {origin} (see {self._key}.about.json); give another --output, or remove both"
            )
        self._rows = {row.key: row for row in read_rows(self._store, self._key, reward_from_row)}

    def read(self, wanted: Callable[[Reward], bool] = lambda row: True) -> dict[Hashable, Reward]:
        """The wanted rewards in the file."""
        return {key: row for key, row in self._rows.items() if wanted(row)}

    def write(self, rows: Sequence[Reward]) -> None:
        """Add rewards to the file."""
        if not rows:
            return
        self._rows |= {row.key: row for row in rows}
        ordered = sorted(self._rows.values(), key=lambda row: self._order.get(row.key, len(self._order)))
        self._store.put(f"{self._key}.about.json", self._about)
        self._store.put(self._key, rows_text(ordered).encode())


def read_responses(uri: str) -> list[Response]:
    """Read the responses in a file that `expo-ray respond` wrote.

    Raises:
        RewardError: if it is empty, or two rows have the same prompt and sample.
        StorageError: if it cannot be read, naming the bad lines.
    """
    folder, name = split_file(uri)
    responses = read_rows(open_store(folder), name, parse_response)
    if not responses:
        raise RewardError(f"{uri}: holds no responses; give the JSONL file that `expo-ray respond` wrote")
    counts = Counter(response.key for response in responses)
    twice = [f"{prompt_id} sample {sample}" for (prompt_id, sample), count in counts.items() if count > 1]
    if twice:
        raise RewardError(
            f"{uri}: {len(twice)} pair(s) of prompt_id and sample stand in several rows ({first_few(twice)}); give each model's "
            "responses their own file, or number the samples"
        )
    return responses


def parse_response(data: Mapping[str, Any]) -> Response:
    """Make a `Response` from a row that anyone may have written; fields that only describe its origin may be missing.

    Raises:
        ValueError: naming the field that is missing or has another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError("is not an object with `prompt_id`, `messages` and `text`")
    messages = data.get("messages")
    turns = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not messages or not turns:
        raise ValueError("`messages` is not a list of turns with `role` and `content`")
    for name in ("prompt_id", "text", "sample"):
        if name not in data:
            raise ValueError(f"`{name}` is missing")
    for name, info in Response.__dataclass_fields__.items():
        expected = int if info.type == "int" else str
        if name != "messages" and name in data and type(data[name]) is not expected:
            raise ValueError(f"`{name}` is not of type {expected.__name__}")
    if data["sample"] < 0:
        raise ValueError("`sample` is below 0")
    given: dict[str, Any] = {name: data[name] for name in Response.__dataclass_fields__ if name in data}
    defaults: dict[str, Any] = {
        "model": "",
        "num_tokens": 0,
        "num_prompt_tokens": 0,
        "finish_reason": "",
        "seed": 0,
    }
    return Response(**defaults | given)


def _read_if_present(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None
