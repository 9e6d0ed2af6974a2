"""Check a model that lies in storage: against its manifest, and against the parents it claims."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, WEIGHT_DTYPES, Checkpoint, Tensor
from expo_ray.config import Pair
from expo_ray.errors import CheckpointError, ExpoError, NotFound, Problems
from expo_ray.extrapolation.low_rank import Float64, widen
from expo_ray.extrapolation.output import MANIFEST
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.receipt import sha256_of
from expo_ray.extrapolation.stream import computed_chunks
from expo_ray.storage import FileInfo, Store, open_store

_THREADS = 4
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Fit:
    """How well one tensor is `dpo + alpha * (dpo - sft)`.

    Attributes:
        alpha: least-squares solution; 0 where sft equals dpo.
        relative_delta: RMS(dpo - sft) / RMS(dpo).
        residual: RMS of what alpha does not explain, as a share of RMS(dpo).
    """

    name: str
    alpha: float
    relative_delta: float
    residual: float


def read_manifest(store: Store) -> dict[str, Any] | None:
    """The folder's `expo.json`, None if another tool wrote the model."""
    try:
        manifest = json.loads(store.read(MANIFEST))
    except NotFound:
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{store.uri}/{MANIFEST} is not JSON ({error}); publish the model again"
        ) from error
    if not isinstance(manifest, dict) or not {"shards", "files", "arithmetic", "plan"} <= manifest.keys():
        raise CheckpointError(
            f"{store.uri}/{MANIFEST} is not a manifest of this format; publish the model again"
        )
    return manifest


def verify_files(store: Store, manifest: Mapping[str, Any]) -> list[ExpoError]:
    """Re-hash every file that the manifest names."""
    present = {info.key: info for info in store.list()}
    wanted = {shard["file"]: shard for shard in manifest["shards"]} | dict(manifest["files"])
    with ThreadPoolExecutor(_THREADS, "verify") as pool:
        checked = pool.map(lambda item: _verify_file(store, present.get(item[0]), *item), wanted.items())
        problems = [problem for problem in checked if problem]
    problems += (
        CheckpointError(f"{store.uri}/{key}: is not part of the model; delete it")
        for key in present
        if key.endswith((".safetensors", ".bin")) and key not in wanted
    )
    return problems


def _verify_file(
    store: Store, info: FileInfo | None, key: str, wanted: Mapping[str, Any]
) -> ExpoError | None:
    if info is None:
        return CheckpointError(f"{store.uri}/{key}: is missing; publish the model again")
    if info.size != wanted["size"]:
        return CheckpointError(
            f"{store.uri}/{key}: has {info.size} bytes, the manifest says {wanted['size']}; publish the model again"
        )
    found = sha256_of(store, info)
    if found != wanted["sha256"]:
        return CheckpointError(
            f"{store.uri}/{key}: has sha256 {found}, the manifest says {wanted['sha256']}; publish the model again"
        )
    return None


def rederive(manifest: Mapping[str, Any], sft: str, dpo: str) -> list[ExpoError]:
    """Compute a published model again from its parents, without writing, and compare the digests of its shards."""
    arithmetic = {
        key: value
        for key, value in manifest["arithmetic"].items()
        if key in Pair.model_fields and value is not None
    }
    alpha = manifest["alpha"]
    plan = plan_pair(
        Pair(sft=sft, dpo=dpo, name=manifest["pair"], alphas=(alpha,), **arithmetic), {alpha: ""}
    )
    wanted = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    if [shard.file for shard in plan.shards] != list(wanted):
        return [
            CheckpointError(
                f"these parents give {len(plan.shards)} shard(s), the model has {len(wanted)}; name its own parents"
            )
        ]
    return [
        CheckpointError(f"{shard.file}: sft {sft} and dpo {dpo} give other weights; name the parents that the manifest names")
        for index, shard in enumerate(plan.shards)
        if _digest(plan, index, alpha) != wanted[shard.file]
    ]  # fmt: skip


def _digest(plan: PairPlan, index: int, alpha: float) -> str:
    digest = hashlib.sha256(plan.shards[index].header)
    for chunk in computed_chunks(plan, index, [alpha], "cpu"):
        digest.update(chunk.outs[0])
    return digest.hexdigest()


def fit_alphas(model: str, sft: str, dpo: str) -> Iterator[Fit]:
    """The alpha that fits each weight of a model, whoever made it; tensors in the model's order.

    Raises:
        Problems: if the three folders do not hold the same tensors in the same shapes.
    """
    checkpoints = [read_checkpoint(open_store(uri)) for uri in (model, sft, dpo)]
    names = [name for name, tensor in checkpoints[0].tensors.items() if tensor.dtype in WEIGHT_DTYPES]
    problems: list[ExpoError] = []
    for name in names:
        shapes = [one.tensors[name].shape if name in one.tensors else None for one in checkpoints]
        if len(set(shapes)) > 1:
            problems.append(
                CheckpointError(
                    f"{name}: model, sft and dpo have shapes {shapes}; only tensors of one shape can be compared"
                )
            )
    if problems:
        raise Problems(problems)
    stores = [open_store(one.uri) for one in checkpoints]
    with ThreadPoolExecutor(_THREADS, "fit") as pool:
        yield from pool.map(lambda name: _fit(name, checkpoints, stores), names)


def _fit(name: str, checkpoints: list[Checkpoint], stores: list[Store]) -> Fit:
    tensors = [one.tensors[name] for one in checkpoints]
    step = _READ_BYTES // 8
    sums = np.zeros(4)
    for first in range(0, tensors[0].numel, step):
        count = min(step, tensors[0].numel - first)
        model, sft, dpo = (
            _read(store, one, tensor, first, count)
            for store, one, tensor in zip(stores, checkpoints, tensors, strict=True)
        )
        delta, moved = dpo - sft, model - dpo
        sums += delta @ delta, delta @ moved, moved @ moved, dpo @ dpo
    delta_square, product, moved_square, dpo_square = map(float, sums)
    alpha = product / delta_square if delta_square else 0.0
    rest = max(0.0, moved_square - alpha * product)
    scale = dpo_square or 1.0
    return Fit(name, alpha, sqrt(delta_square / scale), sqrt(rest / scale))


def _read(store: Store, checkpoint: Checkpoint, tensor: Tensor, first: int, count: int) -> Float64:
    width = DTYPE_BYTES[tensor.dtype]
    data = memoryview(bytearray(count * width))
    store.read_into(tensor.file, tensor.start + first * width, data, etag=checkpoint.files[tensor.file].etag)
    return widen(data, tensor.dtype)
