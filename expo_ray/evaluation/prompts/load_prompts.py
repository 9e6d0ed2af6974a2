"""Load sets of prompts: from files in any store, or by the names `ultrafeedback` and `alpaca-eval` from the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from expo_ray.checkpoint.small_files import read_small
from expo_ray.config import PromptSource
from expo_ray.errors import Collected, PromptError
from expo_ray.evaluation.prompts.prompt_rows import IGNORED, parse_prompt, unasked
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Prompt
from expo_ray.evaluation.row_store import bad_rows_message
from expo_ray.storage import Store, local_path, open_store, split_file
from expo_ray.text import first_few, shown
from expo_ray.untrusted import kind_of, parse_json

log = logging.getLogger("expo_ray")

# The Hub's names of the sets that have a short name here: repository, and split or file.
_ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
_ULTRAFEEDBACK_SPLIT = "test_gen"
_ALPACA_EVAL = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
_NAMED = {
    "ultrafeedback": lambda: _load_dataset(_ULTRAFEEDBACK, split=_ULTRAFEEDBACK_SPLIT),
    "alpaca-eval": lambda: _load_dataset("json", data_files=_ALPACA_EVAL, split="train"),
}
# Kind of a file by the end of its name; each but Parquet may also end in .gz.
_KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".txt": "text", ".json": "list", ".csv": "table", ".tsv": "table",
    ".parquet": "parquet",
}  # fmt: skip
_ENDINGS = ".jsonl, .txt, .json, .csv, .tsv or .parquet"
# Files of other kinds under these names, recognised by their first bytes.
_MAGIC = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive or spreadsheet; save it as .csv or .jsonl",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it, or compress it with gzip",
    b"BZh": "compressed with bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz; unpack it, or compress it with gzip",
}
# Ten times the largest set of prompts in use. Rows take about five times as much memory as their file.
_MOST_BYTES = 256 * 2**20
_ROWS_AT_ONCE = 64

# Pairs of a place, such as `line 3`, and its content; and a function that makes a row of the content, or raises a ValueError.
_Rows = tuple[Iterable[tuple[str, Any]], Callable[[Any], Any]]


def load_prompts(sources: Iterable[PromptSource]) -> list[PromptSet]:
    """Load the prompts of each source. Rows that repeat an earlier one are left out, with a warning.

    Raises:
        Problems: with every problem of any source, all bad rows of a file in one.
    """
    problems, sets = Collected(), list[PromptSet]()
    for source in sources:
        with problems.catching():
            sets.append(load_prompt_set(source))
    problems.raise_any()
    return sets


def load_prompt_set(source: PromptSource) -> PromptSet:
    """Load the prompts of one source.

    Raises:
        PromptError: if it holds rows that are not prompts, or no prompts at all, or cannot be downloaded from the Hub.
        StorageError: if it cannot be read.
    """
    prompts = PromptSet.of(source.name, _parse_rows(source.source, *_read_rows(source.source)))
    if not prompts.prompts:
        raise PromptError(f"{source.source}: holds no prompts; give a file with at least one")
    if prompts.repeated:
        log.warning(
            "%s: %d row(s) repeat an earlier prompt and are left out", source.source, prompts.repeated
        )
    if source.limit and source.limit > len(prompts):
        log.warning(
            "%s: has %d prompts, fewer than the limit of %d", source.source, len(prompts), source.limit
        )
    return prompts.limit(source.limit)


def _parse_rows(source: str, rows: Iterable[tuple[str, Any]], row_in: Callable[[Any], Any]) -> list[Prompt]:
    prompts: list[Prompt] = []
    problems: list[str] = []
    first: dict[str, tuple[str, Mapping[str, str]]] = {}
    size = 0
    for place, content in rows:
        try:
            row = row_in(content)
            prompt = parse_prompt(row)
            known_at, known = first.setdefault(prompt.id, (place, unasked(row)))
            _check_repeated(known_at, known, unasked(row))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        prompts.append(prompt)
        size += sum(len(turn["content"]) for turn in prompt.messages)
        if size > _MOST_BYTES:
            raise PromptError(f"{source}: more than {_MOST_BYTES} characters of prompts; split the set")
    if problems:
        raise PromptError(f"{source}: {bad_rows_message(problems)}")
    if columns := sorted({name for _, texts in first.values() for name in texts}):
        names = first_few([f"`{shown(name, 60)}`" for name in columns])
        log.warning(
            "note: %s: the text in %s is not asked; if it belongs to the question, put it there",
            source,
            names,
        )
    return prompts


def _check_repeated(place: str, earlier: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse a row that differs from an earlier one only in a text that is not asked: that text must be part of the question.

    Raises:
        ValueError: naming the columns that differ.
    """
    differing = [name for name in now if now[name] != earlier.get(name)]
    if differing:
        names = ", ".join(f"`{shown(name, 60)}`" for name in differing)
        raise ValueError(
            f"asks the same as {place} but for {names}, which is not asked; put all that is asked into `prompt`, or remove {names}"
        )


def _read_rows(source: str) -> _Rows:
    if source in _NAMED:
        return _numbered(_NAMED[source]()), _unchanged
    folder, name = split_file(source)
    kind = _kind(name)
    if not kind:
        return _numbered(_read_folder(source)), _unchanged
    store = open_store(folder)
    data = _unpacked(source, _read_file(source, store, name))
    if kind == "parquet":
        return _numbered(_parquet_rows(source, data)), _unchanged
    for magic, text in _MAGIC.items():
        if data.startswith(magic):
            raise PromptError(f"{source}: is {text}")
    text = _decoded(source, data)
    if kind == "list":
        return _numbered(_list_rows(source, text)), _unchanged
    if kind == "table":
        return _table_rows(source, text, tabs=".tsv" in name.lower()), _unchanged
    return _lines(text), _plain_row if kind == "text" else _json_row


def _kind(name: str) -> str:
    """The kind of a file by its name; empty if it is not a file of prompts."""
    plain = name.lower().removesuffix(".gz")
    return next((kind for ending, kind in _KINDS.items() if plain.endswith(ending)), "")


def _read_file(source: str, store: Store, name: str) -> bytes:
    info = store.stat(name)
    if info.size > _MOST_BYTES:
        raise PromptError(
            f"{source}: {info.size} bytes, more than the {_MOST_BYTES} that are read; split the file"
        )
    return read_small(store, info, most_bytes=_MOST_BYTES)


def _unpacked(source: str, data: bytes) -> bytes:
    """`data`, decompressed if it is gzip, up to the size that is read."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            whole = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"{source}: is not whole ({error}); download it again") from error
    if len(whole) > _MOST_BYTES:
        raise PromptError(
            f"{source}: unpacks to more than the {_MOST_BYTES} bytes that are read; split the file"
        )
    return whole


def _unchanged(row: Any) -> Any:
    return row


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines that are not blank. Not splitlines(), which also splits at U+2028 and U+0085; texts hold both."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r")


def _plain_row(line: str) -> Mapping[str, Any]:
    return {"prompt": line}


def _json_row(line: str) -> Any:
    try:
        return parse_json(line, "row", most_bytes=_MOST_BYTES, error=PromptError, remedy="correct the row")
    except PromptError as error:
        raise ValueError(str(error).removeprefix("row: ")) from None


def _decoded(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{source}, line {line}: is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _list_rows(source: str, text: str) -> list[Any]:
    """The rows of a JSON list, which is the form of AlpacaEval's own files."""
    remedy = "name a file with a row in each line .jsonl"
    rows = parse_json(text, source, most_bytes=_MOST_BYTES, error=PromptError, remedy=remedy)
    if not isinstance(rows, list):
        raise PromptError(
            f"{source}: holds one {kind_of(rows)}; a .json file of prompts is one list of rows, "
            "and a file with a row in each line is named .jsonl"
        )
    return rows


def _table_rows(source: str, text: str, *, tabs: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a table with the names of its columns in the first line."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    csv.field_size_limit(_MOST_BYTES)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise PromptError(
                f"{source}: a column stands twice in its first line ({', '.join(map(shown, names))}); rename it"
            )
        for values in lines:
            if values:
                fits = len(values) == len(names)
                yield f"line {lines.line_num}", dict(zip(names, values, strict=True)) if fits else values
    except csv.Error as error:
        raise PromptError(f"{source}, line {lines.line_num}: {shown(error)}; save the table again") from error


def _parquet_rows(source: str, data: bytes) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", source) from error
    try:
        with parquet.ParquetFile(io.BytesIO(data)) as file:
            names = file.schema_arrow.names
            # UltraFeedback's other columns hold two answers to each prompt.
            answers = IGNORED - {"category", "dataset", "question_id"}
            if not {"prompt", "messages", "instruction", "turns"} & {*names}:
                answers -= {"chosen", "rejected"}
            wanted = [name for name in names if name.lower() not in answers]
            # Few at a time: a column that repeats one long text a million times is small in the file, and huge in memory.
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise PromptError(
            f"{source}: is not a Parquet file that can be read ({shown(error)}); download it again"
        ) from error


def _read_folder(source: str) -> Iterable[Any]:
    """Read the rows in a copy of a Hub repository: UltraFeedback with its splits, or any with files of one kind."""
    if local_path(source) is None:
        raise PromptError(
            f"{source}: is not a file of prompts; name one that ends in {_ENDINGS}, or `ultrafeedback` or `alpaca-eval`"
        )
    files = [info.key for info in open_store(source).list()]
    if not files and os.path.lexists(os.path.expanduser(source)):
        empty = os.path.isdir(os.path.expanduser(source))
        raise PromptError(
            f"{source}: {'is an empty folder' if empty else 'is no kind of file that is read'}; give prompts in a file that ends in "
            f"{_ENDINGS}"
        )
    if not files:
        raise PromptError(
            f"{source}: no such folder, and no file of prompts; name a file that ends in {_ENDINGS}, "
            "a folder that holds one, or `ultrafeedback` or `alpaca-eval`"
        )
    of_split = [key for key in files if key.rpartition("/")[2].startswith(f"{_ULTRAFEEDBACK_SPLIT}-")]
    chosen = of_split or [key for key in files if key.endswith(("alpaca_eval.json", ".parquet"))]
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
        rows: Iterable[Any] = datasets.load_dataset(path, **options)
    except Exception as error:  # its file systems and the Hub's client raise errors of any class
        raise PromptError(
            f"{name}: cannot be loaded ({type(error).__name__}: {shown(' '.join(str(error).split()), 300)}); if this machine does not reach the "
            "Hub, download the file elsewhere and name it as the source"
        ) from error
    return rows


def _missing(module: str, source: str) -> PromptError:
    return PromptError(f"{source}: needs the package {module}; pip install 'expo-ray[evaluate]'")
