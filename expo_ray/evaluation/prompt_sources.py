"""Where prompts come from: files in any store, and the sets of UltraFeedback and AlpacaEval."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from expo_ray.config import PromptSource
from expo_ray.errors import Attempts, PromptError
from expo_ray.evaluation.parts import bad_rows
from expo_ray.evaluation.prompt_rows import parse_prompt
from expo_ray.evaluation.prompts import PromptSet, prompt_of
from expo_ray.evaluation.records import Prompt
from expo_ray.storage import open_store, split_file

log = logging.getLogger("expo_ray")

# What the Hub calls the sets that have a name here: repository, and its split or file.
_ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
_ULTRAFEEDBACK_SPLIT = "test_gen"
_ALPACA_EVAL = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
_NAMED = {
    "ultrafeedback": lambda: _load_dataset(_ULTRAFEEDBACK, split=_ULTRAFEEDBACK_SPLIT),
    "alpaca-eval": lambda: _load_dataset("json", data_files=_ALPACA_EVAL, split="train"),
}
_FILES = (".jsonl", ".txt", ".json", ".parquet")

# Each row with its place, such as `line 3`, and what makes a prompt of it or raises a ValueError.
_Rows = tuple[Iterable[tuple[str, Any]], Callable[[Any], Prompt]]


def load_prompts(sources: Iterable[PromptSource]) -> list[PromptSet]:
    """The prompts of each source; rows that repeat an earlier one are left out, and told of.

    Raises:
        Problems: with everything that is wrong with any of them, all bad rows of a file in one.
    """
    attempts = Attempts()
    sets = [one for source in sources for one in attempts.attempt(partial(load_prompt_set, source))]
    attempts.end()
    return sets


def load_prompt_set(source: PromptSource) -> PromptSet:
    """The prompts of one source.

    Raises:
        PromptError: if it holds rows that are no prompts, or none at all, or cannot be had from the Hub.
        StorageError: if it cannot be read.
    """
    found = PromptSet.of(source.name, _parse(source.source, *_rows(source.source)))
    if not found.prompts:
        raise PromptError(f"{source.source}: holds no prompts; give a file with at least one")
    if found.repeated:
        log.warning("%s: %d row(s) repeat an earlier prompt and are left out", source.source, found.repeated)
    if source.limit and source.limit > len(found):
        log.warning("%s: has %d prompts, fewer than the limit of %d", source.source, len(found), source.limit)
    return found.limit(source.limit)


def _parse(source: str, rows: Iterable[tuple[str, Any]], prompt_in: Callable[[Any], Prompt]) -> list[Prompt]:
    prompts, wrong = [], []
    for place, row in rows:
        try:
            prompts.append(prompt_in(row))
        except ValueError as error:
            wrong.append(f"{place}: {error}")
    if wrong:
        raise PromptError(f"{source}: {bad_rows(wrong)}")
    return prompts


def _rows(source: str) -> _Rows:
    if source in _NAMED:
        return _numbered(_NAMED[source]()), parse_prompt
    folder, name = split_file(source)
    plain = name.removesuffix(".gz")
    if not plain.endswith(_FILES):
        return _numbered(_in_folder(source)), parse_prompt
    data = open_store(folder).read(name)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise PromptError(f"{source}: is not whole ({error}); fetch it again") from error
    if plain.endswith(".parquet"):
        return _numbered(_in_parquet(source, data)), parse_prompt
    text = _decoded(source, data)
    if plain.endswith(".json"):
        return _numbered(_in_list(source, text)), parse_prompt
    return _lines(text), _plain_prompt if plain.endswith(".txt") else _json_prompt


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines that are not blank. Not splitlines(): texts hold U+2028 and its like."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r")


def _plain_prompt(line: str) -> Prompt:
    return prompt_of([{"role": "user", "content": line}])


def _json_prompt(line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    return parse_prompt(row)


def _decoded(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{source}, line {line}: is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _in_list(source: str, text: str) -> list[Any]:
    """AlpacaEval's own form: one list of rows."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise PromptError(
            f"{source}: is not JSON ({error}); name a file with a row in each line .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise PromptError(
            f"{source}: holds {type(rows).__name__}; a .json file of prompts is one list of rows, "
            "and a file with a row in each line is named .jsonl"
        )
    return rows


def _in_parquet(source: str, data: bytes) -> list[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", source) from error
    known = {"prompt", "messages", "instruction", "turns", "category", "dataset", "question_id"}
    try:
        # UltraFeedback's other columns hold two answers to each prompt.
        with parquet.ParquetFile(io.BytesIO(data)) as file:
            table = file.read(columns=[name for name in file.schema_arrow.names if name in known])
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(
            f"{source}: is not a Parquet file that can be read ({error}); fetch it again"
        ) from error
    rows: list[Mapping[str, Any]] = table.to_pylist()
    return rows


def _in_folder(source: str) -> Iterable[Any]:
    """A copy of a repository of the Hub: UltraFeedback with its splits, or any with files of one kind."""
    if "://" in source:
        raise PromptError(
            f"{source}: is no file of prompts; name one that ends in {', '.join(_FILES)}, or `ultrafeedback` or `alpaca-eval`"
        )
    found = {info.key: info for info in open_store(source).list()}
    if not found:
        raise PromptError(
            f"{source}: no such folder, and no file of prompts; name a file that ends in {', '.join(_FILES)}, "
            "a folder that holds one, or `ultrafeedback` or `alpaca-eval`"
        )
    of_split = [key for key in found if key.rpartition("/")[2].startswith(f"{_ULTRAFEEDBACK_SPLIT}-")]
    chosen = of_split or [key for key in found if key.endswith(("alpaca_eval.json", ".parquet"))]
    if not chosen:
        raise PromptError(
            f"{source}: holds neither a split `{_ULTRAFEEDBACK_SPLIT}` nor alpaca_eval.json nor other Parquet files "
            "of prompts; name the file itself"
        )
    kind = "parquet" if chosen[0].endswith(".parquet") else "json"
    root = open_store(source).uri
    return _load_dataset(kind, data_files=[f"{root}/{key}" for key in sorted(chosen)], split="train")


def _load_dataset(path: str, **options: Any) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", path) from error
    name = options.get("data_files", path)
    try:
        found: Iterable[Any] = datasets.load_dataset(path, **options)
    except Exception as error:  # whatever its many file systems and the Hub's client raise
        raise PromptError(
            f"{name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); without a way to the "
            "Hub, fetch the file elsewhere and name it as the source"
        ) from error
    return found


def _missing(module: str, source: str) -> PromptError:
    return PromptError(f"{source}: needs the package {module}; pip install 'expo-ray[evaluate]'")
