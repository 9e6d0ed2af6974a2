"""Verify a stored model: its files against its manifest, and its weights against the parents that the manifest names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from expo_ray.config import Pair, parse_pair
from expo_ray.errors import CheckpointError, ExpoError, NotFound, StorageError
from expo_ray.extrapolation.manifest import MANIFEST, MANIFEST_BYTES, parse_manifest
from expo_ray.extrapolation.model_folder import CLAIM
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.receipt import hash_file
from expo_ray.extrapolation.stream import compute_pages
from expo_ray.storage import FileInfo, Store
from expo_ray.storage.missing import missing_folder
from expo_ray.text import shown, shown_names

_THREADS = 4
_BOOKKEEPING = (".expo/", ".gitattributes", ".git/", ".cache/huggingface/")


def read_manifest(store: Store) -> dict[str, Any] | None:
    """Read the folder's `expo.json`; None if another tool wrote the model.

    Raises:
        NotFound: if the folder is missing or empty.
        CheckpointError: if the model is unfinished, or its manifest damaged.
    """
    try:
        data = store.read(MANIFEST, most_bytes=MANIFEST_BYTES)
    except NotFound:
        present = {info.key for info in store.list()}
        if not present:
            raise NotFound(missing_folder(store)) from None
        if CLAIM in present:
            raise CheckpointError(
                f"{store.uri}: the model is unfinished; its job is still running, or was stopped and must be run again"
            ) from None
        return None
    return parse_manifest(data, f"{store.uri}/{MANIFEST}")


def verify_files(store: Store, manifest: Mapping[str, Any]) -> list[ExpoError]:
    """Hash every file that the manifest names, and report each that differs, is missing or does not belong to the model."""
    present = {info.key: info for info in store.list()}
    wanted = {shard["file"]: shard for shard in manifest["shards"]} | dict(manifest["files"])
    with ThreadPoolExecutor(_THREADS, "verify") as pool:
        checked = pool.map(lambda item: _verify_file(store, present.get(item[0]), *item), wanted.items())
        problems = [problem for problem in checked if problem]
    problems += (
        CheckpointError(
            f"{store.uri}/{shown(key)}: is not part of the model, and what loads it may read it; move it elsewhere"
        )
        for key in _foreign_files(present, manifest)
    )
    return problems


def _foreign_files(present: Iterable[str], manifest: Mapping[str, Any]) -> list[str]:
    """Keys that a published model's manifest does not name, without the bookkeeping of expo-ray, Git and the Hub's client."""
    wanted = {MANIFEST, *(shard["file"] for shard in manifest["shards"]), *manifest["files"]}
    return [key for key in present if key not in wanted and not key.startswith(_BOOKKEEPING)]


def refuse_foreign_files(store: Store) -> None:
    """Refuse to serve a published model beside files that its manifest does not name.

    An engine would load a template, code or an adapter that someone put there. A folder that another tool wrote has no manifest and
    passes.

    Raises:
        NotFound: if there is no such folder.
        CheckpointError: if a model of expo-ray is unfinished.
        StorageError: if there are such files.
    """
    manifest = read_manifest(store)
    foreign = _foreign_files([info.key for info in store.list()], manifest) if manifest else []
    if foreign:
        raise StorageError(
            f"{store.uri}: holds {len(foreign)} file(s) that are not part of the published model "
            f"({shown_names(foreign)}); move them elsewhere"
        )


def _verify_file(
    store: Store, info: FileInfo | None, key: str, wanted: Mapping[str, Any]
) -> ExpoError | None:
    if info is None:
        return CheckpointError(f"{store.uri}/{key}: is missing; run its job again")
    if info.fault:
        return CheckpointError(f"{store.uri}/{key}: {info.fault}; put the file itself in its place")
    if info.size != wanted["size"]:
        return CheckpointError(
            f"{store.uri}/{key}: has {info.size} bytes, the manifest says {wanted['size']}; run its job again"
        )
    try:
        sha256 = hash_file(store, info)
    except (CheckpointError, StorageError) as error:
        return error
    if sha256 != wanted["sha256"]:
        return CheckpointError(
            f"{store.uri}/{key}: has sha256 {sha256}, the manifest says {wanted['sha256']}; run its job again with --overwrite"
        )
    return None


def rederive(
    manifest: Mapping[str, Any], sft: str, dpo: str, *, allow_pickle: bool = False
) -> list[ExpoError]:
    """Compute a published model again from its parents, in memory, and compare the digest of each shard with the manifest's.

    Args:
        manifest: of the published model.
        sft: URI of the parent before alignment; it may have moved since.
        dpo: URI of the aligned parent.
        allow_pickle: read parents that are PyTorch pickles.

    Returns:
        A problem for each shard that these parents do not give.

    Raises:
        ExpoError: if the parents cannot be read or are no pair.
    """
    arithmetic = {
        key: value
        for key, value in manifest["arithmetic"].items()
        if key in Pair.model_fields and value is not None
    }
    alpha = manifest["alpha"]
    pair = parse_pair(
        {
            "sft": sft,
            "dpo": dpo,
            "name": manifest["pair"],
            "alphas": [alpha],
            "allow_pickle": allow_pickle,
            **arithmetic,
        },
        MANIFEST,
    )
    plan = plan_pair(pair, {alpha: ""})
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
    digest = hashlib.sha256()
    for page in compute_pages(plan, index, [alpha], "cpu"):
        digest.update(page.outs[0])
    return digest.hexdigest()
