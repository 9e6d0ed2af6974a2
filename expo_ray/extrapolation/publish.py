"""Turn stored shards into a published model: side files, index, card, and the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray import __version__
from expo_ray.arithmetic.rule import ROUNDINGS
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.adapter import scaled_adapter_config
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.small_files import read_small
from expo_ray.errors import AlreadyExists, ArithmeticFault, NotFound, OutputError
from expo_ray.extrapolation.findings import warnings_of
from expo_ray.extrapolation.layout import index_of
from expo_ray.extrapolation.manifest import FORMAT
from expo_ray.extrapolation.match import written_dtype
from expo_ray.extrapolation.model_folder import (
    ADAPTER_CONFIG,
    CARD,
    MANIFEST,
    check_claim,
    clear,
    read_published,
)
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt, read_receipt, read_receipt_of_twin
from expo_ray.report.model_card import model_card
from expo_ray.report.results import PairResult
from expo_ray.storage import Store, open_store
from expo_ray.text import first_few
from expo_ray.untrusted import parse_json_object

_TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Published:
    """A model that readers may trust.

    Attributes:
        effective_alpha: the alpha that the written weights carry, over all tensors; None where none was computed.
        warnings: what a user should look at before using it.
    """

    pair: str
    alpha: float
    uri: str
    plan_id: str
    size: int
    effective_alpha: float | None
    warnings: tuple[str, ...]


def publish(plan: PairPlan, alpha: float, result: PairResult | None = None) -> Published:
    """Complete the model at `alpha`, whose shards are all stored. A model that is already complete is left alone.

    Args:
        result: what was measured of the pair, for the model's card.

    Raises:
        OutputError: if a shard is missing, or another plan has taken the folder.
        ArithmeticFault: if sft and dpo turn out to be the same weights; what was stored is deleted.
    """
    store = open_store(plan.outputs[alpha])
    check_claim(plan, alpha)
    complete = _published(store)
    if complete:
        return complete
    receipts = _receipts(plan, alpha)
    statistics = {name: one for receipt in receipts for name, one in receipt.statistics.items()}
    total = sum(statistics.values(), TensorStatistics())
    if total.elements and not total.changed:
        clear(store)  # nothing of it is a model, and the folder is free for the right pair
        raise ArithmeticFault(
            f"{plan.name}: dpo equals sft in all {total.elements:,} weights ({plan.dpo.uri}, {plan.sft.uri}), so there is "
            "nothing to extrapolate; name the model from before and the model from after alignment"
        )
    manifest = _manifest(plan, alpha, receipts, statistics)
    files = {key: _copy(parent, key, plan, store) for key, parent in plan.side_files.items()}
    for key, data in _written_anew(plan, alpha):
        store.put(key, data)
        files[key] = _named(data)
    files[CARD] = _named(_put_first(store, CARD, model_card(manifest, result).encode()))
    _put_first(store, MANIFEST, _json(manifest | {"files": files}))
    return published_from(read_published(store), store.uri)


def _published(store: Store) -> Published | None:
    try:
        return published_from(read_published(store), store.uri)
    except NotFound:
        return None


def _put_first(store: Store, key: str, data: bytes) -> bytes:
    """What the folder then holds: `data`, or what a twin put there before.

    Card and manifest of two runs of one plan differ where the runs name their parents differently. The first of each stays, so
    that a manifest never speaks of a card that was overwritten.
    """
    try:
        store.put_if_absent(key, data)
    except AlreadyExists:
        return store.read(key)
    return data


def published_from(manifest: Mapping[str, Any], uri: str) -> Published:
    """What a stored manifest says of its model."""
    size = sum(shard["size"] for shard in manifest["shards"])
    statistics = manifest["statistics"]
    effective = statistics["effective_alpha"] if statistics["elements"] else None
    return Published(
        manifest["pair"],
        manifest["alpha"],
        uri,
        manifest["plan"],
        size,
        effective,
        tuple(manifest["warnings"]),
    )


def _receipts(plan: PairPlan, alpha: float) -> list[Receipt]:
    store = open_store(plan.outputs[alpha])
    present = {info.key: info for info in store.list()}
    found = {
        shard.file: read_receipt(store, plan.plan_id(alpha), shard.file, present) for shard in plan.shards
    }
    for file, receipt in found.items():
        found[file] = receipt or read_receipt_of_twin(store, plan.plan_id(alpha), file)
    missing = [file for file, receipt in found.items() if receipt is None]
    if missing:
        raise OutputError(
            f"{store.uri}: {len(missing)} shard(s) are missing or changed ({first_few(missing)}); run the job again"
        )
    return [receipt for receipt in found.values() if receipt]


def _written_anew(plan: PairPlan, alpha: float) -> Iterator[tuple[str, bytes]]:
    """Key and content of what stands beside the weights and is no copy."""
    if plan.scaled:
        yield ADAPTER_CONFIG, _json(scaled_adapter_config(plan.dpo.adapter, alpha))
    elif len(plan.shards) > 1:
        yield index_of(plan.shards), _json(_index(plan))


def _copy(parent: Checkpoint, key: str, plan: PairPlan, output: Store) -> dict[str, Any]:
    """Copy a file of a parent into the model, a piece at a time; `config.json` with the dtype of the weights."""
    source, info = open_store(parent.uri), parent.files[key]
    if key == "config.json" or info.size <= output.chunk_bytes:
        data = read_small(source, info, most_bytes=info.size)
        data = _with_dtype(data, plan) if key == "config.json" else data
        output.put(key, data)
        return _named(data)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(output.chunk_bytes))
    with output.writer(key, info.size) as writer:
        for start in range(0, info.size, len(buffer)):
            view = buffer[: min(len(buffer), info.size - start)]
            source.read_into(key, start, view, etag=info.etag)
            digest.update(view)
            writer.write(view)
        writer.commit()
    return {"size": info.size, "sha256": digest.hexdigest()}


def _named(data: bytes) -> dict[str, Any]:
    """What the manifest holds of a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _with_dtype(config: bytes, plan: PairPlan) -> bytes:
    """`config.json` as it is, unless the weights are written in another dtype than it says."""
    wanted = written_dtype(plan.options)
    if wanted == "keep":
        return config
    data = parse_json_object(config, "config.json of dpo")
    declared = {"torch_dtype": ""} | data if "dtype" not in data else data
    changed = _declaring(declared, _TORCH_DTYPES[wanted])
    return config if changed == data else _json(changed)


def _declaring(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same configuration with `dtype` wherever one is declared, in those of towers as well."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _declaring(value, dtype)
    return changed


def _index(plan: PairPlan) -> dict[str, Any]:
    """The index of a sharded model, as `transformers` writes it."""
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    total = plan.bytes_written - sum(len(shard.header) for shard in plan.shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _manifest(
    plan: PairPlan, alpha: float, receipts: Sequence[Receipt], statistics: Mapping[str, TensorStatistics]
) -> dict[str, Any]:
    options = plan.options
    return {
        "format": FORMAT,
        "expo_ray": __version__,
        "plan": plan.plan_id(alpha),
        "pair": plan.name,
        "alpha": alpha,
        "arithmetic": {
            "formula": ROUNDINGS[options.rounding].formula,
            "rounding": options.rounding,
            "seed": options.seed,
            "dtype": options.dtype,
            "vocab": options.vocab,
            "adapter": options.adapter if plan.dpo.adapter else None,
            "multipliers": dict(options.multipliers),
            "shard_size": options.shard_size,
        },
        "parents": {side: _parent(checkpoint) for side, checkpoint in (("sft", plan.sft), ("dpo", plan.dpo))},
        "shards": [{"file": one.file, "size": one.size, "sha256": one.sha256} for one in receipts],
        "warnings": list(warnings_of(plan, alpha, statistics)),
        "not_carried_over": list(plan.left_behind),
        "statistics": _described(sum(statistics.values(), TensorStatistics()))
        | {"tensors": {name: _described(one) for name, one in statistics.items()}},
    }


def _parent(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "uri": checkpoint.uri,
        "revision": checkpoint.revision,
        "files": {
            key: {"size": info.size, "etag": info.etag} for key, info in sorted(checkpoint.files.items())
        },
    }


def _described(one: TensorStatistics) -> dict[str, float | int]:
    rms_weight = (one.dpo_square / one.elements) ** 0.5 if one.elements else 0.0
    return {
        "elements": one.elements,
        "changed_share": float(f"{one.changed_share:.6g}"),
        "rms_weight": float(f"{rms_weight:.6g}"),
        "rms_delta": float(f"{rms_weight * one.relative_delta:.6g}"),
        "effective_alpha": float(f"{one.effective_alpha:.6g}"),
    }


def _json(data: Mapping[str, Any]) -> bytes:
    # A path that is not UTF-8 holds halves of surrogate pairs, which no encoding has.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
