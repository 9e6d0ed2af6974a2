"""Rewards in a file of their own, without a job."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from expo_ray.errors import NotFound, OutputError, RewardError
from expo_ray.evaluation.records import Response, Reward, reward_from_row
from expo_ray.evaluation.rewards.reward_inputs import parse_response
from expo_ray.evaluation.row_store import read_rows, rows_text
from expo_ray.storage import Store, open_output_file, open_store, split_file
from expo_ray.text import first_few


class RewardFile:
    """One JSONL file of rewards, in the order of the responses; it is replaced as a whole, so no reader sees half a row.

    Beside it, `<file>.about.json` tells what made the rewards.

    Args:
        order: keys of the responses.
        about: what decides the rewards; a file that another model made is refused.

    Raises:
        OutputError: if the file holds something else, or cannot be written.
        StorageError: if `uri` names no file, or it cannot be read.
    """

    def __init__(self, uri: str, order: Iterable[Hashable], about: Mapping[str, Any]) -> None:
        self._store, self._key = open_output_file(uri)
        self._order = {key: place for place, key in enumerate(order)}
        self._about = (json.dumps(about, indent=1) + "\n").encode()
        self._rows: dict[Hashable, Reward] = {}
        if (there := _read(self._store, self._key)) is None:
            return
        if _read(self._store, f"{self._key}.about.json") != self._about:
            told = "of other responses, another reward model or other settings" if there else "that is empty"
            raise OutputError(
                f"{uri}: there is a file already, {told} ({self._key}.about.json tells); give another --output, or remove both"
            )
        self._rows = {row.key: row for row in read_rows(self._store, self._key, reward_from_row)}

    def read(self, wanted: Callable[[Reward], bool] = lambda row: True) -> dict[Hashable, Reward]:
        """The wanted rewards that are there."""
        return {key: row for key, row in self._rows.items() if wanted(row)}

    def write(self, rows: Sequence[Reward]) -> None:
        """Add some rewards."""
        if not rows:
            return
        self._rows |= {row.key: row for row in rows}
        ordered = sorted(self._rows.values(), key=lambda row: self._order.get(row.key, len(self._order)))
        self._store.put(f"{self._key}.about.json", self._about)
        self._store.put(self._key, rows_text(ordered).encode())


def read_responses(uri: str) -> list[Response]:
    """The responses in a file that `expo-ray respond` wrote.

    Raises:
        RewardError: if it is empty, or two rows answer the same prompt as the same sample.
        StorageError: if it cannot be read, naming the bad lines.
    """
    folder, name = split_file(uri)
    responses = read_rows(open_store(folder), name, parse_response)
    if not responses:
        raise RewardError(f"{uri}: holds no responses; give the JSONL file that `expo-ray respond` wrote")
    counts = Counter(one.key for one in responses)
    twice = [f"{prompt_id} sample {sample}" for (prompt_id, sample), count in counts.items() if count > 1]
    if twice:
        raise RewardError(
            f"{uri}: {len(twice)} pair(s) of prompt_id and sample stand in several rows ({first_few(twice)}); give each model's "
            "responses a file of their own, or number the samples"
        )
    return responses


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None
