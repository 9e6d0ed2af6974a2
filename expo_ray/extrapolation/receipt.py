"""Receipts: the proof that one shard of one model is stored, with its digest and the statistics of its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.errors import CheckpointError, InputChanged, NotFound
from expo_ray.extrapolation.reading import FileRanges
from expo_ray.storage import FileInfo, Store
from expo_ray.storage.checksums import CRC_BYTES, RangeChecksum
from expo_ray.untrusted import TOKENIZER_BYTES, Foreign, parse_json, validated

# Runs of one plan that may write a shard while its digest is taken; more will never meet in one folder.
_TWINS = 8


@dataclass(frozen=True)
class Receipt:
    """A stored shard.

    Attributes:
        sha256: hex digest of the whole file.
        statistics: by tensor, of those that were extrapolated.
        read: what it was computed from, with checksums: by side, by file; only of files whose store has a checksum.
    """

    plan_id: str
    file: str
    size: int
    sha256: str
    etag: str
    statistics: Mapping[str, TensorStatistics]
    read: Mapping[str, Mapping[str, FileRanges]] = field(default_factory=dict)


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Sum = Annotated[
    float, Field(allow_inf_nan=True)
]  # weights that overflow are refused later, with their names


def _check_algorithm(name: str) -> str:
    if name not in CRC_BYTES:
        raise ValueError(f"{name} is not one of {', '.join(CRC_BYTES)}")
    return name


class _StoredSums(Foreign):
    """`TensorStatistics` as it is stored."""

    elements: _Count
    changed: _Count
    dpo_square: _Sum
    delta_square: _Sum
    moved_delta: _Sum
    nan: _Count
    inf: _Count
    overflow: _Count


class _StoredRange(Foreign):
    start: _Count
    end: _Count
    value: Annotated[int, Field(ge=0, lt=2**64)]


class _StoredRanges(Foreign):
    algorithm: Annotated[str, AfterValidator(_check_algorithm)]
    ranges: list[_StoredRange]


class _StoredReceipt(Foreign):
    plan_id: str
    file: str
    size: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    etag: str
    statistics: dict[str, _StoredSums]
    read: dict[str, dict[str, _StoredRanges]] = Field(default_factory=dict)


def receipt_key(plan_id: str, file: str) -> str:
    """Key of a shard's receipt in the model's folder."""
    return f".expo/{plan_id}/{file.removesuffix('.safetensors')}.json"


def write_receipt(store: Store, receipt: Receipt) -> None:
    """Store a receipt; its shard must be there already."""
    text = json.dumps(asdict(receipt), indent=1, sort_keys=True)
    store.put(receipt_key(receipt.plan_id, receipt.file), text.encode())


def delete_receipt(store: Store, plan_id: str, file: str) -> None:
    """Delete the receipt of `file`, so that the shard is written again."""
    store.delete(receipt_key(plan_id, file))


def read_receipt(store: Store, plan_id: str, file: str, present: Mapping[str, FileInfo]) -> Receipt | None:
    """Read the receipt of `file`; None if there is none, or the stored file has another size or ETag than it says.

    Args:
        present: the files of the folder, by key.
    """
    if receipt_key(plan_id, file) not in present or file not in present:
        return None
    receipt, stored = _read(store, receipt_key(plan_id, file)), present[file]
    return receipt if receipt and (receipt.size, receipt.etag) == (stored.size, stored.etag) else None


def read_receipt_of_twin(store: Store, plan_id: str, file: str) -> Receipt | None:
    """Read the receipt of `file` and hash the stored file; None if its bytes are not those of the receipt.

    Another run of the same plan may have written the shard again a moment ago and not yet its receipt, so the ETag differs while
    the bytes are the same.
    """
    for _ in range(_TWINS):
        receipt = _read(store, receipt_key(plan_id, file))
        try:
            stored = store.stat(file)
            if receipt is None or stored.size != receipt.size or hash_file(store, stored) != receipt.sha256:
                return None
        except NotFound:
            return None
        except InputChanged:  # yet another twin
            continue
        return replace(receipt, etag=stored.etag)
    return None


def hash_file(store: Store, info: FileInfo) -> str:
    """Read a whole stored file, a chunk at a time, and return its hex digest.

    Raises:
        InputChanged: if it is no longer the one of `info`.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(store.chunk_bytes))
    for start in range(0, info.size, len(buffer)):
        view = buffer[: min(len(buffer), info.size - start)]
        store.read_into(info.key, start, view, etag=info.etag)
        digest.update(view)
    return digest.hexdigest()


def _read(store: Store, key: str) -> Receipt | None:
    """Read a receipt. One that is missing or damaged is None: its shard is written again."""
    try:
        data = parse_json(store.read(key, most_bytes=TOKENIZER_BYTES), key, most_bytes=TOKENIZER_BYTES)
        stored = validated(_StoredReceipt, data, key, error=CheckpointError, remedy="")
    except (NotFound, CheckpointError):
        return None
    statistics = {name: TensorStatistics(**sums.model_dump()) for name, sums in stored.statistics.items()}
    read = {
        side: {file: _ranges(ranges) for file, ranges in files.items()} for side, files in stored.read.items()
    }
    return Receipt(stored.plan_id, stored.file, stored.size, stored.sha256, stored.etag, statistics, read)


def _ranges(stored: _StoredRanges) -> FileRanges:
    parts = (RangeChecksum(part.start, part.end, part.value) for part in stored.ranges)
    return FileRanges(stored.algorithm, tuple(parts))
