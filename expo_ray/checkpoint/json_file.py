"""Small files of a checkpoint, which came from somebody else: every way they can be wrong is a `CheckpointError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import shown
from expo_ray.untrusted import CONFIG_BYTES, TOKENIZER_BYTES, Foreign, parse_json_object, validated

# These hold a vocabulary, or a name for each tensor or module; everything else is a configuration.
_LARGE = ("tokenizer", "vocab", "merges", "added_tokens", "tekken", "adapter_config")


def refuse_fault(store: Store, info: FileInfo) -> None:
    """Refuse an entry of a local folder that is no file of it.

    Raises:
        CheckpointError: if it is a FIFO, a link that leads elsewhere or nowhere, or has a name that no key can hold.
    """
    if info.fault:
        remedy = (
            "rename it, or remove it"
            if "name" in info.fault
            else "put the file itself in its place, or remove it"
        )
        raise CheckpointError(f"{store.uri}/{shown(info.key)}: {info.fault}; {remedy}")


def read_small(store: Store, info: FileInfo, *, most_bytes: int = TOKENIZER_BYTES) -> bytes:
    """Read the whole of a file of at most `most_bytes`, of the version `info.etag` and no other.

    Raises:
        CheckpointError: if it is larger, or no file of this folder.
        InputChanged: if it is no longer that version.
    """
    refuse_fault(store, info)
    if info.size > most_bytes:
        raise CheckpointError(
            f"{store.uri}/{info.key}: {info.size} bytes, more than the {most_bytes} such a file can have; "
            "put the right file in its place"
        )
    data = bytearray(info.size)
    if data:
        store.read_into(info.key, 0, memoryview(data), etag=info.etag)
    return bytes(data)


class AddedToken(Foreign):
    """One entry of `added_tokens` in tokenizer.json, the file of the tokenizers library."""

    id: int
    content: str
    special: bool


class _AddedTokens(Foreign):
    added_tokens: list[AddedToken]


def added_tokens(tokenizer: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens that a tokenizer.json lists; none where it lists no such thing."""
    try:
        return validated(
            _AddedTokens, tokenizer, "tokenizer.json", error=CheckpointError, remedy=""
        ).added_tokens
    except CheckpointError:
        return []


def read_json(store: Store, info: FileInfo, *, strict: bool = False) -> dict[str, Any]:
    """Read one file that holds a JSON object; errors as of `read_small` and `parse_json_object`."""
    name = info.key.rpartition("/")[2]
    large = name.startswith(_LARGE) or name.endswith(".index.json")
    most = TOKENIZER_BYTES if large else CONFIG_BYTES
    data = read_small(store, info, most_bytes=most)
    return parse_json_object(data, f"{store.uri}/{info.key}", most_bytes=most, strict=strict)
