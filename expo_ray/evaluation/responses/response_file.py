"""Responses in a file of their own, without a job."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Hashable, Mapping
from typing import Literal

from expo_ray.errors import NotFound, OutputError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.responses.ask_missing import Key
from expo_ray.evaluation.responses.benchmark_exports import alpaca_eval, mt_bench
from expo_ray.evaluation.row_store import RowStore, read_rows, rows_text
from expo_ray.storage import open_output_file

Format = Literal["jsonl", "alpaca-eval", "mt-bench"]


class ResponseFile:
    """One JSONL file of responses, and the parts beside it that are not in it yet.

    The file is replaced as a whole, so no reader sees half a row. In another format it is made anew from the responses, which
    `<file>.responses.jsonl` keeps.

    Raises:
        OutputError: if it cannot be written.
        StorageError: if `uri` names no file.
    """

    def __init__(self, uri: str, form: Format = "jsonl") -> None:
        self._store, self._name = open_output_file(uri)
        self._form = form
        self._rows_name = self._name if form == "jsonl" else f"{self._name}.responses.jsonl"
        self.uri = f"{self._store.uri}/{self._rows_name}"
        self.parts = RowStore(self._store, f"{self._rows_name}.parts", response_from_row)

    def read(self) -> dict[Hashable, Response]:
        """The rows of the file and of the parts, by key.

        Raises:
            StorageError: naming the rows that are no responses.
        """
        try:
            rows = read_rows(self._store, self._rows_name, response_from_row)
        except NotFound:
            rows = []
        found: dict[Hashable, Response] = {}
        for row in rows:
            found.setdefault(row.key, row)
        return found | {key: row for key, row in self.parts.read().items() if key not in found}

    def write(self, prompts: PromptSet) -> None:
        """Move the parts into the file, those to `prompts` first and in their order."""
        parts = self._store.list(f"{self.parts.prefix}/")
        if not parts and self._store.list(self._rows_name):
            return
        place = {prompt.id: number for number, prompt in enumerate(prompts.prompts)}
        of_others = len(place), 0
        rows = sorted(
            self.read().values(),
            key=lambda row: (place[row.prompt_id], row.sample) if row.prompt_id in place else of_others,
        )
        self._store.put(self._rows_name, rows_text(rows).encode())
        for info in parts:
            self._store.delete(info.key)
        if self._store.local_path is not None:  # a bucket has no folders
            with contextlib.suppress(OSError):
                (self._store.local_path / self.parts.prefix).rmdir()

    def export(self, prompts: PromptSet, responses: Mapping[Key, Response], samples: int) -> None:
        """Write the file of a benchmark, unless the format is `jsonl`.

        Raises:
            PromptError: if it cannot be made of these prompts and responses.
        """
        if self._form == "alpaca-eval":
            text = json.dumps(alpaca_eval(prompts, responses), ensure_ascii=False, indent=1) + "\n"
        elif self._form == "mt-bench":
            rows = mt_bench(prompts, responses, samples=samples, seconds=time.time())
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            return
        self._store.put(self._name, text.encode())


def check_origins(uri: str, found: Mapping[Hashable, Response], origins: Collection[str]) -> None:
    """Refuse a file with responses that are not of these origins.

    Raises:
        OutputError: naming what is in it.
    """
    others = [row for row in found.values() if row.origin not in origins]
    if others:
        models = sorted({row.model for row in others})
        raise OutputError(
            f"{uri}: holds {len(others)} response(s) of {', '.join(models)}, from other weights, sampling or engine than now; "
            "give another --output, or remove it"
        )
