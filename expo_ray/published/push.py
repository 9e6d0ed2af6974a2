"""Push a published model to the Hugging Face Hub: as the manifest describes it, in one commit, and never over another model."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from expo_ray.config import format_alpha
from expo_ray.errors import InputChanged, OutputError, StorageError
from expo_ray.extrapolation.manifest import parse_manifest
from expo_ray.extrapolation.model_folder import CARD, MANIFEST
from expo_ray.progress import size_text
from expo_ray.published.verify import read_manifest
from expo_ray.storage import FileInfo, Store, open_store
from expo_ray.storage.hub import HubStore
from expo_ray.storage.hub_push import HubRepository
from expo_ray.text import first_few

log = logging.getLogger("expo_ray")

# What a repository may hold before its first model: a new one has the first, one made on the Hub's pages the others.
_HARMLESS = {".gitattributes", CARD, "LICENSE"}
# Files up to this size travel within the commit.
_WITHIN_COMMIT = 8 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Push:
    """What is to be sent.

    Attributes:
        head: the repository when it was looked at; None if it is not there yet.
        files: what it lacks, by key; empty if it holds the whole model.
        stale: files of an earlier version of the model, to be deleted in the same commit.
    """

    store: Store
    manifest: Mapping[str, Any]
    repository: HubRepository
    head: HubStore | None
    files: Mapping[str, FileInfo]
    stale: tuple[str, ...] = ()

    def described(self, *, private: bool) -> str:
        """Where it would go, and every file with its size."""
        if not self.files:
            return f"{self.repository.url} holds plan {self.manifest['plan']} already; there is nothing to do"
        state = "exists, its visibility stays"
        if self.head is None:
            state = "would be created, " + ("private" if private else "as public as its owner's default")
        width = max(map(len, (*self.files, *self.stale)))
        total = sum(info.size for info in self.files.values())
        return "\n".join(
            [
                f"{self.store.uri} -> {self.repository.url} ({state})",
                *(f"  {key:{width}}  {size_text(info.size):>8}" for key, info in self.files.items()),
                *(f"  {key:{width}}  deleted, of the version that is there" for key in self.stale),
                f"{len(self.files)} file(s), {size_text(total)}, in one commit",
            ]
        )


def plan_push(folder: str, repo_id: str) -> Push:
    """Compare a published model with what the Hub holds; nothing is written.

    A repository is taken if it is new, if it holds this very model, or an earlier version of it: same name of the pair, same
    parents' places, another plan.

    Raises:
        OutputError: if the folder is not what its manifest says, or the repository holds something else.
        StorageError: if either cannot be read.
    """
    store = open_store(folder)
    manifest = read_manifest(store)
    if manifest is None:
        raise OutputError(
            f"{store.uri} has no {MANIFEST}, so nothing says that it is whole; push a folder that expo-ray published"
        )
    files = _checked_files(store, manifest)
    repository = HubRepository(repo_id)
    head = repository.look()
    if head is None:
        return Push(store, manifest, repository, None, files)
    lacking, stale = _against(head, manifest)
    return Push(store, manifest, repository, head, {key: files[key] for key in lacking}, stale)


def push(plan: Push, *, private: bool = False) -> str:
    """Send what is lacking, one shard at a time, then commit; the model's address on the Hub.

    Args:
        private: whether a repository that is created is; one that is there keeps its visibility.

    Raises:
        StorageError: if the Hub refuses; its files then are as they were.
    """
    if not plan.files:
        return plan.repository.url
    store, repository = plan.store, plan.repository
    head = plan.head or repository.create(private=private)
    large = {key: sha256 for key, sha256 in _large(plan.manifest).items() if key in plan.files}
    uploaded = []
    for number, (key, sha256) in enumerate(large.items(), start=1):
        with _on_disk(store, plan.files[key]) as path:
            uploaded.append(repository.upload(key, path, sha256))
        log.info("%s: uploaded %s (%d of %d)", repository.uri, key, number, len(large))
    small = {key: _small(store, key, plan.manifest) for key in plan.files if key not in large}
    message = f"{plan.manifest['pair']} at alpha {format_alpha(plan.manifest['alpha'])}, plan {plan.manifest['plan']}"
    try:
        there = repository.commit(uploaded, small, plan.stale, parent=head.revision, message=message)
    except InputChanged:  # by a twin, or by ourselves and the answer was lost
        seen = repository.look()
        if seen is None or _against(seen, plan.manifest)[0]:
            raise
        there = seen
    lacking, _ = _against(there, plan.manifest)
    if lacking:
        raise StorageError(f"{there.uri} does not list {first_few(lacking)} after the commit; push again")
    return repository.url


def _large(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Key and sha256 of what is sent from disk, one file at a time: shards, and other files that memory need not hold."""
    files = manifest["files"].items()
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]} | {
        key: file["sha256"] for key, file in files if file["size"] > _WITHIN_COMMIT
    }


def _named(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Size of every file that a manifest names."""
    shards = {one["file"]: one["size"] for one in manifest["shards"]}
    return shards | {key: one["size"] for key, one in manifest["files"].items()}


def _checked_files(store: Store, manifest: Mapping[str, Any]) -> dict[str, FileInfo]:
    present = {info.key: info for info in store.list()}
    named = _named(manifest)
    wrong = [
        key
        for key, size in named.items()
        if key not in present or present[key].size != size or present[key].fault
    ]
    if wrong:
        raise OutputError(
            f"{store.uri}: {len(wrong)} file(s) are missing or not of the size in {MANIFEST} ({first_few(wrong)}); run its job again"
        )
    return {key: present[key] for key in (*named, MANIFEST)}


def _against(head: HubStore, manifest: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """What a repository lacks of a model, and what of an earlier version has to go.

    Raises:
        OutputError: if it is another model's.
    """
    present = {info.key: info for info in head.list()}
    named = _named(manifest)
    if ".gitignore" in present:
        raise OutputError(
            f"{head.uri} has a .gitignore, by which the Hub leaves out what is sent; delete it there, or choose another repository"
        )
    if MANIFEST not in present:
        foreign = sorted(present.keys() - _HARMLESS)
        if foreign:
            raise OutputError(
                f"{head.uri} holds files that expo-ray did not push ({first_few(foreign, 3)}); choose another repository"
            )
        return [*named, MANIFEST], ()
    theirs = _manifest_of(head)
    if theirs["plan"] == manifest["plan"]:
        digests = {one["file"]: one["sha256"] for one in manifest["shards"]}
        return [key for key in named if not _holds(present.get(key), named[key], digests.get(key))], ()
    if _origin(theirs) != _origin(manifest):
        raise OutputError(
            f"{head.uri} holds the model of another pair ({_text(theirs)}; this one is {_text(manifest)}); choose another "
            "repository"
        )
    old = _named(theirs)
    foreign = sorted(key for key in present.keys() - old.keys() - named.keys() if key.endswith(_WEIGHTS))
    if foreign:
        raise OutputError(
            f"{head.uri} holds weights beside the model ({first_few(foreign, 3)}); delete them there, or choose another repository"
        )
    return [*named, MANIFEST], tuple(sorted(present.keys() & old.keys() - named.keys()))


def _holds(info: FileInfo | None, size: int, sha256: str | None) -> bool:
    """True if the Hub has a file: shards by digest; cards may have been edited there."""
    if info is None or sha256 is None:
        return info is not None
    return info.etag == sha256 if len(info.etag) == len(sha256) else info.size == size


def _manifest_of(head: HubStore) -> dict[str, Any]:
    return parse_manifest(
        head.read(MANIFEST),
        f"{head.uri}/{MANIFEST}",
        error=OutputError,
        remedy="choose another repository",
    )


def _origin(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Pair and places of its parents, whatever their revision."""
    places = (str(manifest["parents"][side]["uri"]) for side in ("sft", "dpo"))
    return str(manifest["pair"]), *(
        re.sub(r"(?<=[^/])@[^/]+", "", one) if one.startswith("hf://") else one for one in places
    )


def _text(manifest: Mapping[str, Any]) -> str:
    pair, sft, dpo = _origin(manifest)
    return f"{pair} at alpha {format_alpha(manifest['alpha'])} from sft {sft} and dpo {dpo}"


def _small(store: Store, key: str, manifest: Mapping[str, Any]) -> bytes:
    data = store.read(key)
    wanted = manifest["files"].get(key, {}).get("sha256")
    if wanted and hashlib.sha256(data).hexdigest() != wanted:
        raise InputChanged(
            f"{store.uri}/{key} is not the file that {MANIFEST} names; look with `expo-ray verify`"
        )
    return data


@contextmanager
def _on_disk(store: Store, info: FileInfo) -> Iterator[str]:
    """Path of a local copy of one shard, gone afterwards; of the shard itself if the store is local."""
    if store.local_path is not None:
        yield str(store.local_path / info.key)
        return
    with tempfile.NamedTemporaryFile(prefix="expo-ray-push-") as file:
        try:
            buffer = memoryview(bytearray(store.chunk_bytes))
            for start in range(0, info.size, len(buffer)):
                view = buffer[: min(len(buffer), info.size - start)]
                store.read_into(info.key, start, view, etag=info.etag)
                file.write(view)
            file.flush()
        except OSError as error:
            raise StorageError(
                f"{file.name}: {error}; set TMPDIR to a folder with room for {size_text(info.size)}, the biggest shard"
            ) from error
        yield file.name
