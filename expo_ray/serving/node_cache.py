"""Copies of model folders on the node that serves them, fetched once however many engines want them, and verified."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from expo_ray.checkpoint.tensors import Checkpoint
from expo_ray.errors import CheckpointError, StorageError
from expo_ray.extrapolation.model_folder import MANIFEST
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.progress import size_text
from expo_ray.published.verify import read_manifest, refuse_foreign_files
from expo_ray.storage import FileInfo, Store, open_store
from expo_ray.storage.local_writer import free_bytes
from expo_ray.storage.uri import check_key, check_listing, expand_home
from expo_ray.text import shown
from expo_ray.untrusted import TOKENIZER_BYTES, parse_json_object

CACHE_VARIABLE = "EXPO_RAY_CACHE"
_COMPLETE = ".complete.json"
_FILES_AT_ONCE = 4


def cache_folder() -> Path:
    """Where copies are kept: `$EXPO_RAY_CACHE`, else `expo-ray` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.abspath(expand_home(chosen)))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "expo-ray"


def on_this_node(plan: PairPlan) -> PairPlan:
    """The same plan, reading both parents from this node's disk.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if one cannot be fetched, or has no room here.
    """
    return replace(plan, sft=_local(plan.sft), dpo=_local(plan.dpo))


def engine_folder(plan: PairPlan) -> Path:
    """A folder on this node that an engine for the pair can start from: dpo, or sft with dpo's side files for an adapter."""
    here = on_this_node(plan)
    if not plan.dpo.adapter:
        return Path(here.dpo.uri)
    folder = cache_folder() / "engines" / plan.plan_id(0)
    with _locked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        weights = {key: here.sft for key in here.sft.files if key not in here.sft.side_files}
        for key, source in {**weights, **here.side_files}.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).symlink_to(Path(source.uri) / key)
    return folder


def published_folder(uri: str) -> Path:
    """A model folder on this node; a local one where it is.

    Raises:
        NotFound: if there is no such folder.
        CheckpointError: if a model of expo-ray is unfinished.
        StorageError: if it cannot be fetched, is not what its manifest says, or holds files that the manifest does not know.
    """
    store = open_store(uri)
    refuse_foreign_files(store)
    files = {info.key: info for info in store.list() if not info.key.startswith(".expo/")}
    return _fetched(store, files) if "://" in store.uri else Path(store.uri)


def _local(checkpoint: Checkpoint) -> Checkpoint:
    if "://" not in checkpoint.uri:
        return checkpoint
    folder = _fetched(open_store(checkpoint.uri), checkpoint.files)
    store = open_store(str(folder))
    return replace(checkpoint, uri=store.uri, files={key: store.stat(key) for key in checkpoint.files})


def _fetched(store: Store, files: Mapping[str, FileInfo]) -> Path:
    """Download these very files, once; the name of their folder says which they are."""
    check_listing(files, store.uri)
    if _COMPLETE in files:
        raise StorageError(f"{store.uri}: {_COMPLETE} is a name that copies on a node need; rename this file")
    identity = json.dumps([store.uri, *([info.key, info.size, info.etag] for info in files.values())])
    folder = cache_folder() / "models" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    with _locked(folder):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _check_space(folder, files)
            _fetch(store, files, folder)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this node at a time; the kernel lets go of a dead one's lock."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise StorageError(
            f"{folder.parent}: {error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(store: Store, files: Mapping[str, FileInfo], folder: Path) -> None:
    promised = _promised(store, files)
    with ThreadPoolExecutor(_FILES_AT_ONCE, "fetch") as pool:
        found = dict(
            zip(files, pool.map(lambda info: _copy(store, info, folder), files.values()), strict=True)
        )
    for key, digest in promised.items():
        if found.get(key, digest) != digest:
            raise StorageError(
                f"{store.uri}/{key}: its sha256 is {found[key]}, and the manifest says {digest}; publish the model again"
            )
    state = {
        key: [found[key], (folder / key).stat().st_size, (folder / key).stat().st_mtime_ns] for key in files
    }
    (folder / _COMPLETE).write_text(json.dumps(state))


def _promised(store: Store, files: Mapping[str, FileInfo]) -> dict[str, str]:
    """The sha256 of the files that a manifest tells of."""
    if MANIFEST not in files:
        return {}
    manifest = read_manifest(store)
    assert manifest is not None
    shards = {one["file"]: one["sha256"] for one in manifest["shards"]}
    return shards | {key: one["sha256"] for key, one in manifest["files"].items()}


def _copy(store: Store, info: FileInfo, folder: Path) -> str:
    """Download one file into `folder` and nowhere else; returns its sha256."""
    path = folder / check_key(info.key, store.uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert path.parent.resolve().is_relative_to(folder.resolve()), "check_key lets nothing else pass"
    digest, buffer = hashlib.sha256(), memoryview(bytearray(store.chunk_bytes))
    with _new_file(path, store, info.key) as file:
        for start in range(0, info.size, store.chunk_bytes):
            view = buffer[: min(store.chunk_bytes, info.size - start)]
            store.read_into(info.key, start, view, etag=info.etag)
            digest.update(view)
            file.write(view)
    return digest.hexdigest()


def _new_file(path: Path, store: Store, key: str) -> BinaryIO:
    """Create a file; one that is there already has the same name but for case or the form of its letters.

    Raises:
        StorageError: if this node's file system takes two keys for one name.
    """
    try:
        return path.open("xb")
    except FileExistsError as error:
        raise StorageError(
            f"{store.uri}: {shown(key)!r} and another file have one name on this node's file system; set {CACHE_VARIABLE} to a "
            "folder on one that tells them apart"
        ) from error


def _is_whole(folder: Path) -> bool:
    """True if all was fetched, and nothing has been touched since; a touched file is hashed again."""
    try:
        state = parse_json_object((folder / _COMPLETE).read_bytes(), _COMPLETE, most_bytes=TOKENIZER_BYTES)
        return all(_is_same(folder / key, *known) for key, known in state.items())
    except (OSError, ValueError, TypeError, CheckpointError):
        return False


def _is_same(path: Path, sha256: str, size: int, mtime_ns: int) -> bool:
    stat = path.stat()
    if stat.st_size != size or stat.st_mtime_ns == mtime_ns:
        return stat.st_size == size
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _check_space(folder: Path, files: Mapping[str, FileInfo]) -> None:
    need, free = sum(info.size for info in files.values()), free_bytes(str(folder.parent))
    if free is not None and need > free:
        raise StorageError(
            f"{folder.parent}: {size_text(need)} are to be fetched, {size_text(free)} are free; free space, or set "
            f"{CACHE_VARIABLE} to a folder on another disk"
        )
