"""Push published models to the Hugging Face Hub.

A push sends exactly the files that the manifest names, in one commit, and never replaces another model. What the repository holds
already is not sent again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from expo_ray.config import Job, format_alpha
from expo_ray.errors import ExpoError, InputChanged, OutputError, StorageError
from expo_ray.extrapolation.manifest import MANIFEST, parse_manifest
from expo_ray.extrapolation.model_folder import CARD
from expo_ray.progress import size_text
from expo_ray.published.verify import read_manifest
from expo_ray.storage import FileInfo, Store, open_store
from expo_ray.storage.hub import HubStore
from expo_ray.storage.hub_push import HubRepository
from expo_ray.text import first_few

log = logging.getLogger("expo_ray")

# Files that a repository may hold before its first model: the Hub puts the first into each, and its web form the others.
_HARMLESS = {".gitattributes", CARD, "LICENSE"}
# Files up to this size travel within the commit.
_WITHIN_COMMIT = 8 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass
class PushedModels:
    """Results of `push_models`.

    Attributes:
        addresses: on the Hub, by pair.
        failures: error messages, by pair.
    """

    addresses: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPush:
    """A comparison of a published model with a repository: the files to send and to delete.

    Attributes:
        head: the repository at the commit that was compared; None if there is no repository yet.
        files: files that it lacks, by key; empty if it holds the whole model.
        stale: keys of an earlier version of the model, to be deleted in the same commit.
    """

    store: Store
    manifest: Mapping[str, Any]
    repository: HubRepository
    head: HubStore | None
    files: Mapping[str, FileInfo]
    stale: tuple[str, ...] = ()

    def described(self, *, private: bool) -> str:
        """Describe the push for people: repository, every file with its size, and the total."""
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


def plan_push(folder: str, repo_id: str) -> PlannedPush:
    """Compare a published model with a repository of the Hub; nothing is written.

    A repository is accepted if it is missing or empty, or holds this model or an earlier version of it: the same name of the pair
    and the same places of its parents, but another plan.

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
    files = _list_files(store, manifest)
    repository = HubRepository(repo_id)
    head = repository.look()
    if head is None:
        return PlannedPush(store, manifest, repository, None, files)
    lacking, stale = _against(head, manifest)
    return PlannedPush(store, manifest, repository, head, {key: files[key] for key in lacking}, stale)


def push_model(planned: PlannedPush, *, private: bool = False) -> str:
    """Upload the files that the repository lacks, one shard at a time, then commit; returns the model's URL on the Hub.

    Args:
        private: create a missing repository as private; an existing one keeps its visibility.

    Raises:
        InputChanged: if another commit came first and left another model.
        StorageError: if the Hub refuses; the repository is then unchanged.
    """
    if not planned.files:
        return planned.repository.url
    store, repository, manifest = planned.store, planned.repository, planned.manifest
    head = planned.head or repository.create(private=private)
    large = {key: sha256 for key, sha256 in _large(manifest).items() if key in planned.files}
    uploaded = []
    for number, (key, sha256) in enumerate(large.items(), start=1):
        with _on_disk(store, planned.files[key]) as path:
            uploaded.append(repository.upload(key, path, sha256))
        log.info("%s: uploaded %s (%d of %d)", repository.uri, key, number, len(large))
    small = {key: _small(store, key, manifest) for key in planned.files if key not in large}
    message = f"{manifest['pair']} at alpha {format_alpha(manifest['alpha'])}, plan {manifest['plan']}"
    try:
        committed = repository.commit(uploaded, small, planned.stale, parent=head.revision, message=message)
    except InputChanged:
        # A twin of this job may have pushed the same model meanwhile, or our own commit succeeded and its answer was lost. Either
        # way the push is done if the repository now holds the whole model.
        latest = repository.look()
        if latest is None or _against(latest, manifest)[0]:
            raise
        committed = latest
    lacking, _ = _against(committed, manifest)
    if lacking:
        raise StorageError(f"{committed.uri} does not list {first_few(lacking)} after the commit; push again")
    return repository.url


def push_models(job: Job, winners: Mapping[str, str]) -> PushedModels:
    """Push each winner to the repository that the job's `push_to` names; a pair that fails does not stop the others.

    Args:
        winners: the published folder of each pair that has one.
    """
    pushed = PushedModels()
    for pair, folder in winners.items():
        repo_id = job.repo_of(pair)
        if repo_id is None:
            continue
        try:
            pushed.addresses[pair] = push_model(plan_push(folder, repo_id), private=True)
            log.info("%s: pushed to %s", pair, pushed.addresses[pair])
        except ExpoError as error:
            pushed.failures[pair] = f"published at {folder}, but not pushed to {repo_id}: {error}"
            log.error("%s failed: %s", pair, pushed.failures[pair])
    return pushed


def _large(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Keys and sha256 of the files to upload from disk, one at a time: shards, and other files too large for the commit itself."""
    files = manifest["files"].items()
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]} | {
        key: file["sha256"] for key, file in files if file["size"] > _WITHIN_COMMIT
    }


def _named(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Size of every file that a manifest names."""
    shards = {shard["file"]: shard["size"] for shard in manifest["shards"]}
    return shards | {key: file["size"] for key, file in manifest["files"].items()}


def _list_files(store: Store, manifest: Mapping[str, Any]) -> dict[str, FileInfo]:
    """List the files of a published model, manifest last.

    Raises:
        OutputError: if one is missing or has another size than the manifest says.
    """
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
    """Compare a repository with a model: keys that it lacks, and keys of an earlier version to delete.

    Raises:
        OutputError: if it is another model's.
    """
    present = {info.key: info for info in head.list()}
    named = _named(manifest)
    if ".gitignore" in present:
        raise OutputError(
            f"{head.uri} has a .gitignore, and the Hub drops files that it names from a commit; delete it there, or choose another repository"
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
        digests = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
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
    """True if the Hub has the file: shards are compared by digest, others by name alone, as people edit cards on the Hub."""
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
    """Names of the pair and places of its parents, without revisions: equal for all versions of one model."""
    places = (str(manifest["parents"][side]["uri"]) for side in ("sft", "dpo"))
    return str(manifest["pair"]), *(
        re.sub(r"(?<=[^/])@[^/]+", "", place) if place.startswith("hf://") else place for place in places
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
    """Download a file to disk for the duration of the block and give its path; a file of a local store is used in place."""
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
