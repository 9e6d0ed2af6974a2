"""Receipts: the proof that one shard of one model is stored, and what was learned while writing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from expo_ray.errors import NotFound
from expo_ray.extrapolation.statistics import TensorStatistics
from expo_ray.storage import FileInfo, Store


@dataclass(frozen=True)
class Receipt:
    """One stored shard.

    Attributes:
        sha256: hex digest of the whole file.
        statistics: by tensor, of those that were extrapolated.
    """

    plan_id: str
    file: str
    size: int
    sha256: str
    etag: str
    statistics: Mapping[str, TensorStatistics]


def receipt_key(plan_id: str, file: str) -> str:
    """Where the receipt of a shard lies in the model's folder."""
    return f".expo/{plan_id}/{file.removesuffix('.safetensors')}.json"


def write_receipt(store: Store, receipt: Receipt) -> None:
    """Store a receipt; its shard must be there already."""
    text = json.dumps(asdict(receipt), indent=1, sort_keys=True)
    store.put(receipt_key(receipt.plan_id, receipt.file), text.encode())


def read_receipt(store: Store, plan_id: str, file: str, present: Mapping[str, FileInfo]) -> Receipt | None:
    """The receipt of `file` if it is there and the stored file is the one it speaks of, else None.

    Args:
        present: what the folder holds, by key.
    """
    if receipt_key(plan_id, file) not in present or file not in present:
        return None
    try:
        data = json.loads(store.read(receipt_key(plan_id, file)))
    except (NotFound, ValueError):
        return None
    statistics = {name: TensorStatistics(**sums) for name, sums in data.pop("statistics").items()}
    receipt = Receipt(**data, statistics=statistics)
    stored = present[file]
    return receipt if (receipt.size, receipt.etag) == (stored.size, stored.etag) else None
