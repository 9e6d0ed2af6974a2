"""The folder of one model: which plan holds it, how much of the model is there, and who may write into it.

alpha=0.5/.expo/claim.json               put-if-absent: the plan that holds the folder, and every file it will write
alpha=0.5/model-0000i-of-N.safetensors   shards
alpha=0.5/.expo/<plan id>/...            a receipt for each stored shard
alpha=0.5/expo.json                      the manifest, put last: the model is complete
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from expo_ray.config import format_alpha
from expo_ray.errors import AlreadyExists, NotFound, OutputError
from expo_ray.extrapolation.layout import index_of
from expo_ray.extrapolation.manifest import MANIFEST, MANIFEST_BYTES, parse_manifest
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt, read_receipt, read_receipt_of_twin
from expo_ray.storage import FileInfo, Store, open_output, open_store
from expo_ray.storage.local_writer import check_writable
from expo_ray.storage.protocol import PROBE_PREFIX
from expo_ray.text import first_few, shown
from expo_ray.untrusted import Foreign, parse_json, validated

CLAIM = ".expo/claim.json"
CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
# It names every file of the model.
_CLAIM_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FolderState:
    """Contents of a model's folder before a job writes into it.

    Attributes:
        published: the whole model is there, of this very plan.
        done: files of the shards that need not be written again.
        stale: the folder holds a model that was asked to be overwritten.
        damaged: the manifest speaks of files that are gone or cut.
    """

    published: bool = False
    done: frozenset[str] = frozenset()
    stale: bool = False
    damaged: bool = False


class ModelFolder:
    """The folder of the model of `plan` at `alpha`, opened for writing; it cannot travel to another process.

    Raises:
        OutputError: if the folder can only be read.
        StorageError: if its store cannot be opened.
    """

    def __init__(self, plan: PairPlan, alpha: float) -> None:
        self.plan, self.alpha = plan, alpha
        self.store = open_output(plan.outputs[alpha])

    @cached_property
    def plan_id(self) -> str:
        """Digest of all that decides the model's bytes."""
        return self.plan.plan_id(self.alpha)

    def inspect(self, *, overwrite: bool) -> FolderState:
        """Look, without writing, at what the folder holds.

        Args:
            overwrite: accept a model of another plan, if all its files were written by expo-ray.

        Raises:
            OutputError: if the folder is a parent's, can only be read, or holds something that is not to be overwritten.
        """
        self._refuse_parents_folder()
        present = self._present()
        folder = local_folder(self.store.uri)
        if folder and MANIFEST not in present:
            check_writable(folder)
        if not present:
            return FolderState()
        self._refuse_unwritable_files(present, overwrite=overwrite)
        if overwrite:
            self._refuse_foreign_files(present)
            return FolderState(stale=True)
        self._refuse_other_plan(published=MANIFEST in present)
        receipts = (read_receipt(self.store, self.plan_id, shard.file, present) for shard in self.plan.shards)
        whole = self._is_whole(present)
        if whole and MANIFEST in present:
            self.read_manifest()
        return FolderState(
            published=MANIFEST in present and whole,
            done=frozenset(receipt.file for receipt in receipts if receipt),
            damaged=MANIFEST in present and not whole,
        )

    def claim(self) -> None:
        """Reserve the folder for this plan; a run of the same plan joins.

        Raises:
            OutputError: if another plan was faster.
        """
        text = json.dumps({"plan": self.plan_id, "files": self._files()}, indent=1)
        try:
            self.store.put_if_absent(CLAIM, text.encode())
        except AlreadyExists:
            self.check_claim()

    def check_claim(self) -> None:
        """Make sure that the folder is still this plan's. A claim that a failed twin took back is put there again.

        Raises:
            OutputError: if another plan holds it.
        """
        try:
            holder = read_claim(self.store).plan
        except NotFound:
            self.claim()
            return
        if holder != self.plan_id:
            raise OutputError(
                f"output {self.store.uri} was claimed by another job (plan {holder}, this one is {self.plan_id}) for alpha "
                f"{format_alpha(self.alpha)}; choose another output folder"
            )

    def release(self) -> None:
        """Take the claim back if nothing has been stored for it, so that the folder is free for another plan."""
        if list(self._present()) == [CLAIM] and read_claim(self.store).plan == self.plan_id:
            self.store.delete(CLAIM)

    def clear(self) -> None:
        """Delete the model that was claimed, of whatever plan, and nothing else.

        The manifest goes first, so that at no moment a torn model looks whole, and the claim last, so that a second attempt
        still knows what may be deleted.
        """
        keys = _claimed_files(self.store, [info.key for info in self.store.list()])
        for key in sorted(keys, key=lambda key: (key != MANIFEST, key == CLAIM, key)):
            self.store.delete(key)

    def delete_manifest(self) -> None:
        """Delete the manifest of a damaged model, so that nobody trusts it while it is written again."""
        self.store.delete(MANIFEST)

    def read_receipts(self) -> list[Receipt]:
        """Read the receipts of all shards, in their order.

        Raises:
            OutputError: if a shard is missing, or is not the one that its receipt speaks of.
        """
        present = {info.key: info for info in self.store.list()}
        receipts: list[Receipt] = []
        missing: list[str] = []
        for shard in self.plan.shards:
            receipt = read_receipt(self.store, self.plan_id, shard.file, present)
            receipt = receipt or read_receipt_of_twin(self.store, self.plan_id, shard.file)
            if receipt:
                receipts.append(receipt)
            else:
                missing.append(shard.file)
        if missing:
            raise OutputError(
                f"{self.store.uri}: {len(missing)} shard(s) are missing or changed ({first_few(missing)}); run the job again"
            )
        return receipts

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest of the model.

        Raises:
            NotFound: if there is none.
            OutputError: if it is damaged.
        """
        data = self.store.read(MANIFEST, most_bytes=MANIFEST_BYTES)
        remedy = "replace the model with --overwrite"
        return parse_manifest(data, f"{self.store.uri}/{MANIFEST}", error=OutputError, remedy=remedy)

    def _present(self) -> dict[str, FileInfo]:
        """Files in the folder, by key, without those that probe the store."""
        return {info.key: info for info in self.store.list() if not info.key.startswith(PROBE_PREFIX)}

    def _files(self) -> list[str]:
        """Every file of the model but those below `.expo/`."""
        files = {shard.file for shard in self.plan.shards} | {*self.plan.side_files, CARD, MANIFEST}
        if self.plan.scaled:
            files.add(ADAPTER_CONFIG)
        elif len(self.plan.shards) > 1:
            files.add(index_of(self.plan.shards))
        return sorted(files)

    def _is_whole(self, present: Mapping[str, FileInfo]) -> bool:
        sizes = {shard.file: shard.size for shard in self.plan.shards}
        return present.keys() >= set(self._files()) and all(
            present[file].size == size for file, size in sizes.items()
        )

    def _refuse_parents_folder(self) -> None:
        for side, parent in (("sft", self.plan.sft.uri), ("dpo", self.plan.dpo.uri)):
            if _overlap(self.store.uri, parent):
                raise OutputError(
                    f"output {self.store.uri} and {side} {parent} lie in each other; choose another output folder"
                )

    def _refuse_unwritable_files(self, present: Mapping[str, FileInfo], *, overwrite: bool) -> None:
        uri, faulty = self.store.uri, [info for info in present.values() if info.fault]
        # Neither a size nor an ETag: no regular file, so that writing it would wait or fail in the middle of the work.
        irregular = [_described(info) for info in faulty if not info.etag]
        if irregular:
            raise OutputError(
                f"output {uri} holds {first_few(irregular, 3)}; remove what is no file, or choose another output folder"
            )
        if CLAIM not in present:
            raise OutputError(
                f"output {uri} holds other files ({first_few(list(present), 3)}); choose an empty or new folder"
            )
        if faulty and not overwrite:
            raise OutputError(
                f"output {uri} holds what is no file of it: {first_few(list(map(_described, faulty)), 3)}; remove it"
            )

    def _refuse_foreign_files(self, present: Mapping[str, FileInfo]) -> None:
        foreign = sorted(present.keys() - _claimed_files(self.store, present))
        if foreign:
            raise OutputError(
                f"output {self.store.uri} holds files that expo-ray did not write ({first_few(foreign, 3)}); move them elsewhere, "
                "or choose another output folder"
            )

    def _refuse_other_plan(self, *, published: bool) -> None:
        holder = read_claim(self.store).plan
        if holder != self.plan_id:
            raise OutputError(
                f"output {self.store.uri} holds {'the' if published else 'an unfinished'} model of another plan ({holder}; this "
                f"one is {self.plan_id}): other parents, alpha or options; choose another output folder, or remove this one "
                "(`expo-ray extrapolate` and jobs/extrapolate.py do it with --overwrite)"
            )


class Claim(Foreign):
    """The claim of a folder as it is stored: id of the plan that holds it, and every file that the plan writes."""

    plan: str
    files: list[str]


def read_claim(store: Store) -> Claim:
    """Read the claim of a model's folder.

    Raises:
        NotFound: if the folder is not claimed.
        OutputError: if the claim is damaged.
    """
    source, remedy = f"{store.uri}/{CLAIM}", "delete the folder and run again"
    text = store.read(CLAIM, most_bytes=_CLAIM_BYTES)
    data = parse_json(text, source, most_bytes=_CLAIM_BYTES, error=OutputError, remedy=remedy)
    return validated(Claim, data, f"{source} is no claim of this format", error=OutputError, remedy=remedy)


def local_folder(uri: str) -> str | None:
    """The path of a local store's folder, links resolved; None for any other store."""
    path = open_store(uri).local_path
    return None if path is None else os.path.realpath(path)


def _claimed_files(store: Store, present: Iterable[str]) -> set[str]:
    """Those of `present` that the plan which holds the folder writes."""
    files = set(read_claim(store).files)
    return {key for key in present if key in files or key.startswith(".expo/")}


def _described(info: FileInfo) -> str:
    return f"{shown(info.key)} ({info.fault})"


def _overlap(first: str, second: str) -> bool:
    """True if one folder is the other or lies in it."""
    a, b = ((local_folder(uri) or uri).rstrip("/") + "/" for uri in (first, second))
    return a.startswith(b) or b.startswith(a)
