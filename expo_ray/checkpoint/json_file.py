"""JSON that came from somebody else: every way it can be wrong is a `CheckpointError`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store

# The largest tokenizer.json in use is about 35 MB; past this a file is not what its name says.
_MAX_JSON_BYTES = 256 * 2**20


def read_small(store: Store, info: FileInfo) -> bytes:
    """The whole of a file of at most 256 MiB, of the version `info.etag` and no other.

    Raises:
        CheckpointError: if it is larger.
        InputChanged: if it is no longer that version.
    """
    if info.size > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{store.uri}/{info.key}: {info.size} bytes, more than the {_MAX_JSON_BYTES} such a file can have; "
            "put the right file in its place"
        )
    data = bytearray(info.size)
    if data:
        store.read_into(info.key, 0, memoryview(data), etag=info.etag)
    return bytes(data)


def read_json(store: Store, info: FileInfo, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object stored as one file; errors as of `read_small` and `parse_object`."""
    return parse_object(read_small(store, info), f"{store.uri}/{info.key}", strict=strict)


def parse_object(data: bytes, where: str, *, strict: bool = False) -> dict[str, Any]:
    """One JSON object (RFC 8259) in UTF-8.

    Args:
        where: names the text in errors.
        strict: refuse a key that stands twice in one object, NaN and Infinity, all of which other readers take differently.

    Raises:
        CheckpointError: whatever is wrong, including nesting deep enough to exhaust the stack.
    """
    try:
        text = data.decode("utf-8")
        found = json.loads(
            text,
            object_pairs_hook=_unique if strict else None,
            parse_constant=_no_constant if strict else None,
            parse_int=_parse_int,
        )
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # fails on half of a surrogate pair
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply; download the file again") from error
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({_short(str(error))}); download the file again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: a JSON {_kind(found)} instead of an object; download the file again")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _parse_int(text: str) -> int | float:
    # JSON readers with unsigned integers refuse a sign, even before 0.
    return -0.0 if text == "-0" else int(text)


def _kind(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
