"""The file that `expo-ray respond --output` writes: responses without a job, resumable and in a benchmark's format."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Hashable, Mapping

from expo_ray.config.fields import ResponseFormat
from expo_ray.errors import NotFound, OutputError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.responses.ask_missing import Key
from expo_ray.evaluation.responses.benchmark_exports import alpaca_eval, mt_bench
from expo_ray.evaluation.row_store import RowStore, read_rows, rows_text
from expo_ray.storage import open_output_file


class ResponseFile:
    """A JSONL file of responses, and the parts beside it that wait to be moved into it.

    The file is replaced as a whole, so that no reader sees half a row. For the format of a benchmark, the responses are kept in
    `<file>.responses.jsonl`, and the file itself is written anew from them.

    Raises:
        OutputError: if it cannot be written.
        StorageError: if `uri` names no file.
    """

    def __init__(self, uri: str, form: ResponseFormat = "jsonl") -> None:
        self._store, self._name = open_output_file(uri)
        self._form = form
        self._rows_name = self._name if form == "jsonl" else f"{self._name}.responses.jsonl"
        self.uri = f"{self._store.uri}/{self._rows_name}"
        self.parts = RowStore(self._store, f"{self._rows_name}.parts", response_from_row)

    def read(self) -> dict[Hashable, Response]:
        """Read the rows of the file and of the parts, by key.

        Raises:
            StorageError: naming the rows that are not responses.
        """
        try:
            rows = read_rows(self._store, self._rows_name, response_from_row)
        except NotFound:
            rows = []
        by_key: dict[Hashable, Response] = {}
        for row in rows:
            by_key.setdefault(row.key, row)
        return by_key | {key: row for key, row in self.parts.read().items() if key not in by_key}

    def write(self, prompts: PromptSet) -> None:
        """Move the parts into the file: first the responses to `prompts`, in their order, then all others."""
        parts = self._store.list(f"{self.parts.folder}/")
        if not parts and self._store.list(self._rows_name):
            return
        place = {prompt.id: number for number, prompt in enumerate(prompts.prompts)}
        behind = len(place), 0
        rows = sorted(
            self.read().values(),
            key=lambda row: (place[row.prompt_id], row.sample) if row.prompt_id in place else behind,
        )
        self._store.put(self._rows_name, rows_text(rows).encode())
        for info in parts:  # after the file: a kill in between leaves rows twice, never none
            self._store.delete(info.key)
        if self._store.local_path is not None:  # a bucket has no folders
            with contextlib.suppress(OSError):
                (self._store.local_path / self.parts.folder).rmdir()

    def export(self, prompts: PromptSet, responses: Mapping[Key, Response], samples: int) -> None:
        """Write the file in its benchmark's format; nothing for `jsonl`.

        Raises:
            PromptError: if these prompts or responses do not fit the format.
        """
        if self._form == "alpaca-eval":
            text = json.dumps(alpaca_eval(prompts, responses), ensure_ascii=False, indent=1) + "\n"
        elif self._form == "mt-bench":
            rows = mt_bench(prompts, responses, samples=samples, seconds=time.time())
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            return
        self._store.put(self._name, text.encode())


def check_origins(uri: str, responses: Mapping[Hashable, Response], origins: Collection[str]) -> None:
    """Refuse a file with responses of other origins than these.

    Raises:
        OutputError: naming the models of the other responses.
    """
    others = [row for row in responses.values() if row.origin not in origins]
    if others:
        models = sorted({row.model for row in others})
        raise OutputError(
            f"{uri}: holds {len(others)} response(s) of {', '.join(models)}, from other weights, sampling or engine than now; "
            "give another --output, or remove it"
        )
