"""Copies of model folders on the node that serves them: downloaded once however many engines ask, and verified."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.errors import CheckpointError, StorageError, TransientStorageError
from expo_ray.extrapolation.manifest import MANIFEST
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.home import CACHE_VARIABLE, cache_folder
from expo_ray.published.verify import read_manifest, refuse_foreign_files
from expo_ray.serving.cache_room import lease, locked, make_room
from expo_ray.storage import FileInfo, Store, local_path, open_planned, open_store
from expo_ray.storage.checksums import has_awscrt, next_checksum
from expo_ray.storage.retry import READINGS
from expo_ray.storage.uri import check_key, check_listing
from expo_ray.text import shown
from expo_ray.untrusted import TOKENIZER_BYTES, parse_json_object

_COMPLETE = ".complete.json"
_FILES_AT_ONCE = 4
# Ranges of one file, and of all, that are read at once; each takes the memory of a chunk.
_RANGES_OF_A_FILE = 6
_RANGES_AT_ONCE = 16
_SHA256_DIGITS = 64

log = logging.getLogger("expo_ray")


def download_parents(plan: PairPlan) -> PairPlan:
    """Download both parents to this node, once and under a lock, and return the plan pointing at the copies.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if a parent cannot be fetched, or has no room here.
    """
    return replace(plan, sft=_download_checkpoint(plan.sft), dpo=_download_checkpoint(plan.dpo))


def rebuild_engine_folder(plan: PairPlan) -> Path:
    """Download both parents to this node, and return the folder that an engine for the pair starts from.

    That is dpo's own folder. For an adapter it is a folder that is deleted and rebuilt here, with links to sft's weights and
    dpo's side files.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if a parent cannot be fetched, or has no room here.
    """
    local = download_parents(plan)
    if not plan.dpo.adapter:
        return Path(local.dpo.uri)
    folder = cache_folder() / "engines" / plan.plan_id(0)
    with locked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        weights = {key: local.sft for key in local.sft.files if key not in local.sft.side_files}
        for key, parent in {**weights, **local.engine_side_files}.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).symlink_to(Path(parent.uri) / key)
    return folder


def download_model(uri: str) -> Path:
    """Download a model folder into the node cache and return its path; a local folder is returned as is.

    Raises:
        NotFound: if there is no such folder.
        CheckpointError: if a model of expo-ray is unfinished.
        StorageError: if it cannot be fetched, is not what its manifest says, or holds files that the manifest does not know.
    """
    store = open_store(uri)
    refuse_foreign_files(store)
    files = {info.key: info for info in store.list() if not info.key.startswith(".expo/")}
    return _download_once(store, files) if store.local_path is None else store.local_path


def _download_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Download a parent, unless it is local, and return it with the copy's address and files."""
    if local_path(checkpoint.uri) is not None:
        return checkpoint
    folder = _download_once(open_planned(checkpoint.uri, checkpoint.files), checkpoint.files)
    store = open_store(str(folder))
    return replace(checkpoint, uri=store.uri, files={key: store.stat(key) for key in checkpoint.files})


def _download_once(store: Store, files: Mapping[str, FileInfo]) -> Path:
    """Download these very files, unless an earlier copy is whole; their folder is named by a digest of what they are."""
    check_listing(files, store.uri)
    if _COMPLETE in files:
        raise StorageError(f"{store.uri}: {_COMPLETE} is a name that copies on a node need; rename this file")
    identity = json.dumps([store.uri, *([info.key, info.size, info.etag] for info in files.values())])
    folder = cache_folder() / "models" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    with locked(folder):
        lease(folder)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            make_room(folder, sum(info.size for info in files.values()))
            _download_files(store, files, folder)
    return folder


def _download_files(store: Store, files: Mapping[str, FileInfo], folder: Path) -> None:
    """Download all files, compare them with the manifest, and write the marker of a whole copy last."""
    expected = _manifest_digests(store, files)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(_FILES_AT_ONCE, "fetch") as pool,
        ThreadPoolExecutor(_RANGES_AT_ONCE, "range") as ranges,
    ):
        digests = dict(
            zip(
                files,
                pool.map(lambda info: _download_file(store, info, folder, ranges), files.values()),
                strict=True,
            )
        )
    for key, digest in expected.items():
        if digests.get(key, digest) != digest:
            raise StorageError(
                f"{store.uri}/{key}: its sha256 is {digests[key]}, and the manifest says {digest}; publish the model again"
            )
    state = {
        key: [digests[key], (folder / key).stat().st_size, (folder / key).stat().st_mtime_ns] for key in files
    }
    (folder / _COMPLETE).write_text(json.dumps(state))


def _manifest_digests(store: Store, files: Mapping[str, FileInfo]) -> dict[str, str]:
    """Read the sha256 of each file that the manifest names; none without a manifest."""
    if MANIFEST not in files:
        return {}
    manifest = read_manifest(store)
    assert manifest is not None
    shards = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    return shards | {key: file["sha256"] for key, file in manifest["files"].items()}


def _download_file(store: Store, info: FileInfo, folder: Path, ranges: ThreadPoolExecutor) -> str:
    """Download one file into `folder` and nowhere else; returns its sha256.

    Raises:
        TransientStorageError: if it has not the digest or checksum that its store keeps, again and again.
    """
    path = folder / check_key(info.key, store.uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert path.parent.resolve().is_relative_to(folder.resolve()), "check_key lets nothing else pass"
    known = store.checksum(info) if has_awscrt() and info.size else None
    sha256 = info.etag if store.uri.startswith("hf://") and len(info.etag) == _SHA256_DIGITS else ""
    once = known is not None or bool(sha256)
    for _ in range(READINGS):
        digest = hashlib.sha256()
        crc = None
        with _new_file(path, store, info.key) as file:
            for view in _in_order(store, info, ranges, once=once):
                digest.update(view)
                file.write(view)
                crc = next_checksum(known.algorithm, view, crc) if known else None
        if sha256 in {"", digest.hexdigest()} and (known is None or known.value == crc):
            return digest.hexdigest()
        log.warning("%s/%s: bits flipped on their way; fetching it again", store.uri, info.key)
        path.unlink()
    raise TransientStorageError(
        f"{store.uri}/{info.key}: the bytes that arrive do not have the {known.algorithm if known else 'sha256'} that the store keeps "
        "of this file; use https"
    )


def _in_order(
    store: Store, info: FileInfo, ranges: ThreadPoolExecutor, *, once: bool
) -> Iterator[memoryview]:
    """The bytes of a file, front to back, a few ranges of it being read at once."""

    def read(start: int) -> memoryview:
        view = memoryview(bytearray(min(store.chunk_bytes, info.size - start)))
        store.read_into(info.key, start, view, etag=info.etag, once=once)
        return view

    under_way: deque[Future[memoryview]] = deque()
    try:
        for start in range(0, info.size, store.chunk_bytes):
            under_way.append(ranges.submit(read, start))
            if len(under_way) == _RANGES_OF_A_FILE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _new_file(path: Path, store: Store, key: str) -> BinaryIO:
    """Create a file; an existing one has the same name but for case or the form of its letters.

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
    """Check that the copy is complete and unchanged; only files whose modification time differs are hashed again."""
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
