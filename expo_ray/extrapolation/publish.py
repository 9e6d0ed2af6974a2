"""Turn stored shards into a published model: side files, index, card, and the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.adapter import scaled_adapter_config
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.small_files import read_small
from expo_ray.errors import AlreadyExists, ArithmeticFault, NotFound
from expo_ray.extrapolation.integrity import DamagedReading, check_reading
from expo_ray.extrapolation.layout import index_of
from expo_ray.extrapolation.manifest import MANIFEST, manifest_of, statistics_by_tensor
from expo_ray.extrapolation.match import written_dtype
from expo_ray.extrapolation.model_folder import ADAPTER_CONFIG, CARD, ModelFolder
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt, delete_receipt
from expo_ray.report.model_card import model_card
from expo_ray.report.results import PairResult
from expo_ray.storage import Store, open_planned
from expo_ray.untrusted import parse_json_object

# Names of dtypes in `config.json`, by those of a job file.
_TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Published:
    """A model that readers may trust.

    Attributes:
        size: of the weights in bytes.
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


def publish(folder: ModelFolder, result: PairResult | None = None) -> Published:
    """Complete a model whose shards are all stored. A model that is already complete is left alone.

    Args:
        result: what was measured of the pair, for the model's card.

    Raises:
        OutputError: if a shard is missing, or another plan has taken the folder.
        ArithmeticFault: if sft and dpo turn out to be the same weights; what was stored is deleted.
        DamagedReading: if a parent was not read as its store has it; the receipts of the shards concerned are deleted.
    """
    plan, store = folder.plan, folder.store
    folder.check_claim()
    try:
        return _read_published(folder)
    except NotFound:
        pass
    receipts = folder.read_receipts()
    _refuse_equal_parents(folder, receipts)
    try:
        guards = check_reading(plan, receipts)
    except DamagedReading as error:
        for file in error.shards:
            delete_receipt(store, folder.plan_id, file)
        raise
    manifest = manifest_of(plan, folder.alpha, receipts, guards)
    files = {key: _copy(parent, key, plan, store) for key, parent in plan.side_files.items()}
    for key, data in _files_written_anew(plan, folder.alpha):
        store.put(key, data)
        files[key] = _digest(data)
    files[CARD] = _digest(_put_first(store, CARD, model_card(manifest, result).encode()))
    _put_first(store, MANIFEST, _json(manifest | {"files": files}))
    return _read_published(folder)


def _read_published(folder: ModelFolder) -> Published:
    """Read the folder's manifest, which a concurrent run of the same plan may have put.

    Raises:
        NotFound: if the model is not published.
        OutputError: if its manifest is damaged.
    """
    manifest = folder.read_manifest()
    statistics = manifest["statistics"]
    return Published(
        pair=manifest["pair"],
        alpha=manifest["alpha"],
        uri=folder.store.uri,
        plan_id=manifest["plan"],
        size=sum(shard["size"] for shard in manifest["shards"]),
        effective_alpha=statistics["effective_alpha"] if statistics["elements"] else None,
        warnings=tuple(manifest["warnings"]),
    )


def _refuse_equal_parents(folder: ModelFolder, receipts: Sequence[Receipt]) -> None:
    """Clear the folder if dpo equals sft: nothing in it is a model, and it is free for the right pair."""
    plan, total = folder.plan, sum(statistics_by_tensor(receipts).values(), TensorStatistics())
    if total.elements and not total.changed:
        folder.clear()
        raise ArithmeticFault(
            f"{plan.name}: dpo equals sft in all {total.elements:,} weights ({plan.dpo.uri}, {plan.sft.uri}), so there is "
            "nothing to extrapolate; name the model from before and the model from after alignment"
        )


def _put_first(store: Store, key: str, data: bytes) -> bytes:
    """Store `data` unless a concurrent run of the same plan has put its own; returns what the folder then holds.

    Card and manifest of two runs of one plan differ where the runs name their parents differently. The first of each stays, so
    that a manifest never speaks of a card that was overwritten.
    """
    try:
        store.put_if_absent(key, data)
    except AlreadyExists:
        return store.read(key)
    return data


def _files_written_anew(plan: PairPlan, alpha: float) -> Iterator[tuple[str, bytes]]:
    """Key and content of the files beside the weights that are no copies."""
    if plan.scaled:
        yield ADAPTER_CONFIG, scaled_config_file(plan, alpha)
    elif len(plan.shards) > 1:
        yield index_of(plan.shards), _json(_index(plan))


def scaled_config_file(plan: PairPlan, alpha: float) -> bytes:
    """Content of the published `adapter_config.json` of a scaled adapter.

    Raises:
        CheckpointError: if a scale is not a number at this alpha.
    """
    return _json(scaled_adapter_config(plan.dpo.adapter, alpha))


def _index(plan: PairPlan) -> dict[str, Any]:
    """The index of a sharded model, as `transformers` writes it."""
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    total = plan.bytes_written - sum(len(shard.header) for shard in plan.shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _copy(parent: Checkpoint, key: str, plan: PairPlan, output: Store) -> dict[str, Any]:
    """Copy a file of a parent into the model, a piece at a time; `config.json` with the dtype of the weights.

    Returns:
        Size and digest of the copy.
    """
    source, info = open_planned(parent.uri, parent.files), parent.files[key]
    if key == "config.json" or info.size <= output.chunk_bytes:
        data = read_small(source, info, most_bytes=info.size)
        data = _with_dtype(data, plan) if key == "config.json" else data
        output.put(key, data)
        return _digest(data)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(output.chunk_bytes))
    with output.writer(key, info.size) as writer:
        for start in range(0, info.size, len(buffer)):
            view = buffer[: min(len(buffer), info.size - start)]
            source.read_into(key, start, view, etag=info.etag)
            digest.update(view)
            writer.write(view)
        writer.commit()
    return {"size": info.size, "sha256": digest.hexdigest()}


def _digest(data: bytes) -> dict[str, Any]:
    """Size and digest of a file, as the manifest holds them."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _with_dtype(config: bytes, plan: PairPlan) -> bytes:
    """`config.json` as it is, unless the weights are written in another dtype than it says."""
    written = written_dtype(plan.options)
    if written == "keep":
        return config
    data = parse_json_object(config, "config.json of dpo")
    declared = {"torch_dtype": ""} | data if "dtype" not in data else data
    changed = _declaring(declared, _TORCH_DTYPES[written])
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


def _json(data: Mapping[str, Any]) -> bytes:
    # A path that is not UTF-8 holds lone surrogates, which UTF-8 cannot encode.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
