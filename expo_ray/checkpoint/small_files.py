"""The small files of a checkpoint, which a stranger may have written: every fault in them is a `CheckpointError`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import shown
from expo_ray.untrusted import CONFIG_BYTES, TOKENIZER_BYTES, parse_json_object

# These hold a vocabulary, or a name for each tensor or module; everything else is a configuration.
_LARGE = ("tokenizer", "vocab", "merges", "added_tokens", "tekken", "adapter_config")
# Keys of a multimodal configuration below which the one of its language model stands.
_NESTED_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def refuse_fault(store: Store, info: FileInfo) -> None:
    """Refuse an entry of a local folder that cannot be taken for a file of it.

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
        CheckpointError: if it is larger, or `refuse_fault` refuses it.
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


def read_json(store: Store, info: FileInfo, *, strict: bool = False) -> dict[str, Any]:
    """Read a file that holds a JSON object; errors as of `read_small` and `parse_json_object`."""
    name = info.key.rpartition("/")[2]
    large = name.startswith(_LARGE) or name.endswith(".index.json")
    most = TOKENIZER_BYTES if large else CONFIG_BYTES
    data = read_small(store, info, most_bytes=most)
    return parse_json_object(data, f"{store.uri}/{info.key}", most_bytes=most, strict=strict)


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A parsed `config.json` and the configurations of language models nested in it, outermost first.

    A multimodal model may declare a property of its language model at either level, so readers look at all.
    """
    yield config
    for key in _NESTED_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            yield from text_configs(nested)
