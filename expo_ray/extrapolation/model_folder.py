"""The folder of one model: whose it is, what of it is there, and who may write into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_ray.config import format_alpha
from expo_ray.errors import AlreadyExists, ExpoError, NotFound, OutputError
from expo_ray.extrapolation.layout import index_of
from expo_ray.extrapolation.manifest import MANIFEST_BYTES, parse_manifest
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import read_receipt
from expo_ray.progress import size_text
from expo_ray.storage import FileInfo, Store, open_output, open_store
from expo_ray.storage.local_writer import check_writable, free_bytes
from expo_ray.storage.protocol import PROBE_PREFIX
from expo_ray.text import first_few, shown
from expo_ray.untrusted import Foreign, parse_json, validated

CLAIM = ".expo/claim.json"
MANIFEST = "expo.json"
CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
# It names every file of the model.
_CLAIM_BYTES = 16 * 2**20


@dataclass(frozen=True)
class OutputState:
    """What a rerun finds.

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


def inspect_output(plan: PairPlan, alpha: float, *, overwrite: bool) -> OutputState:
    """Look, without writing, at the folder where the model of `alpha` shall go.

    Raises:
        OutputError: if the folder is a parent's, can only be read, or holds something that is not to be overwritten.
    """
    store = open_output(plan.outputs[alpha])
    uri = store.uri
    for side, parent in (("sft", plan.sft.uri), ("dpo", plan.dpo.uri)):
        if _overlap(uri, parent):
            raise OutputError(
                f"output {uri} and {side} {parent} lie in each other; choose another output folder"
            )
    present = {info.key: info for info in store.list() if not info.key.startswith(PROBE_PREFIX)}
    folder = local_folder(uri)
    if folder and MANIFEST not in present:
        check_writable(folder)
    if not present:
        return OutputState()
    # Neither a size nor an ETag: no regular file, so that writing it would wait or fail in the middle of the work.
    odd = [f"{shown(key)} ({info.fault})" for key, info in present.items() if info.fault and not info.etag]
    if odd:
        raise OutputError(
            f"output {uri} holds {first_few(odd, 3)}; remove what is no file, or choose another output folder"
        )
    if CLAIM not in present:
        raise OutputError(
            f"output {uri} holds other files ({first_few(list(present), 3)}); choose an empty or new folder"
        )
    faulty = [f"{shown(key)} ({info.fault})" for key, info in present.items() if info.fault]
    if faulty and not overwrite:
        raise OutputError(f"output {uri} holds what is no file of it: {first_few(faulty, 3)}; remove it")
    holder = claimed_by(store)
    if overwrite:
        foreign = sorted(present.keys() - _claimed_files(store, present))
        if foreign:
            raise OutputError(
                f"output {uri} holds files that expo-ray did not write ({first_few(foreign, 3)}); move them elsewhere, or choose "
                "another output folder"
            )
        return OutputState(stale=True)
    if holder != plan.plan_id(alpha):
        raise OutputError(
            f"output {uri} holds {'the' if MANIFEST in present else 'an unfinished'} model of another plan ({holder}; this one is "
            f"{plan.plan_id(alpha)}): other parents, alpha or options; choose another output folder, or remove this one (`expo-ray extrapolate` and jobs/extrapolate.py do it with --overwrite)"
        )
    done = (read_receipt(store, holder, shard.file, present) for shard in plan.shards)
    whole = _is_whole(plan, present)
    if whole and MANIFEST in present:
        read_published(store)
    return OutputState(
        published=MANIFEST in present and whole,
        done=frozenset(receipt.file for receipt in done if receipt),
        damaged=MANIFEST in present and not whole,
    )


def claim(plan: PairPlan, alpha: float) -> None:
    """Reserve the output folder for this plan; a run of the same plan joins.

    Raises:
        OutputError: if another plan was faster.
    """
    store = open_store(plan.outputs[alpha])
    text = json.dumps({"plan": plan.plan_id(alpha), "files": _files_of(plan)}, indent=1)
    try:
        store.put_if_absent(CLAIM, text.encode())
    except AlreadyExists:
        check_claim(plan, alpha)


def check_claim(plan: PairPlan, alpha: float) -> None:
    """Make sure that the output folder is still this plan's. A claim that a failed twin took back is put there again.

    Raises:
        OutputError: if another plan holds it.
    """
    store = open_store(plan.outputs[alpha])
    try:
        holder = claimed_by(store)
    except NotFound:
        claim(plan, alpha)
        return
    if holder != plan.plan_id(alpha):
        raise OutputError(
            f"output {store.uri} was claimed by another job (plan {holder}, this one is {plan.plan_id(alpha)}) for alpha "
            f"{format_alpha(alpha)}; choose another output folder"
        )


def release(plan: PairPlan, alpha: float) -> None:
    """Take the claim back if nothing has been stored for it, so that the folder is free for another plan."""
    store = open_store(plan.outputs[alpha])
    present = [info.key for info in store.list() if not info.key.startswith(PROBE_PREFIX)]
    if present == [CLAIM] and claimed_by(store) == plan.plan_id(alpha):
        store.delete(CLAIM)


def claimed_by(store: Store) -> str:
    """The id of the plan that holds the folder."""
    return _read_claim(store).plan


def clear(store: Store) -> None:
    """Delete a model that was claimed, and nothing else.

    The manifest goes first, so that at no moment a torn model looks whole, and the claim last, so that a second attempt
    still knows what may be deleted.
    """
    keys = _claimed_files(store, [info.key for info in store.list()])
    for key in sorted(keys, key=lambda key: (key != MANIFEST, key == CLAIM, key)):
        store.delete(key)


def _is_whole(plan: PairPlan, present: Mapping[str, FileInfo]) -> bool:
    sizes = {shard.file: shard.size for shard in plan.shards}
    return present.keys() >= set(_files_of(plan)) and all(
        present[file].size == size for file, size in sizes.items()
    )


def _files_of(plan: PairPlan) -> list[str]:
    """Every file of a model but those below `.expo/`."""
    files = {shard.file for shard in plan.shards} | {*plan.side_files, CARD, MANIFEST}
    if plan.scaled:
        files.add(ADAPTER_CONFIG)
    elif len(plan.shards) > 1:
        files.add(index_of(plan.shards))
    return sorted(files)


def _claimed_files(store: Store, present: Iterable[str]) -> set[str]:
    """Those of `present` that the plan which holds the folder writes."""
    named = set(_read_claim(store).files)
    return {key for key in present if key in named or key.startswith(".expo/")}


def read_published(store: Store) -> dict[str, Any]:
    """The manifest of a model in an output folder.

    Raises:
        NotFound: if there is none.
        OutputError: if it is damaged.
    """
    data = store.read(MANIFEST, most_bytes=MANIFEST_BYTES)
    remedy = "replace the model with --overwrite"
    return parse_manifest(data, f"{store.uri}/{MANIFEST}", error=OutputError, remedy=remedy)


class _Claim(Foreign):
    plan: str
    files: list[str]


def _read_claim(store: Store) -> _Claim:
    source, remedy = f"{store.uri}/{CLAIM}", "delete the folder and run again"
    text = store.read(CLAIM, most_bytes=_CLAIM_BYTES)
    data = parse_json(text, source, most_bytes=_CLAIM_BYTES, error=OutputError, remedy=remedy)
    return validated(_Claim, data, f"{source} is no claim of this format", error=OutputError, remedy=remedy)


def check_space(plans: Iterable[tuple[PairPlan, int]]) -> list[ExpoError]:
    """Local disks that cannot hold what is to be written.

    Args:
        plans: each with the bytes that it still has to write.
    """
    need: dict[tuple[int, str], int] = {}
    for plan, size in plans:
        for uri in plan.outputs.values():
            folder = local_folder(uri)
            if folder:
                place = _existing(folder)
                disk = (os.stat(place).st_dev, place)
                need[disk] = need.get(disk, 0) + size // len(plan.outputs)
    by_device: dict[int, tuple[str, int]] = {}
    for (device, place), size in need.items():
        by_device[device] = (place, by_device.get(device, (place, 0))[1] + size)
    problems: list[ExpoError] = []
    for place, size in by_device.values():
        free = free_bytes(place)
        if free is not None and size > free:
            problems.append(
                OutputError(
                    f"{place}: {size_text(size)} are to be written, {size_text(free)} are free; free space or choose another output"
                )
            )
    return problems


def local_folder(uri: str) -> str | None:
    """The path of a local store's folder, links resolved; None for any other store."""
    path = open_store(uri).local_path
    return None if path is None else os.path.realpath(path)


def _existing(folder: str) -> str:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _overlap(first: str, second: str) -> bool:
    a, b = ((local_folder(uri) or uri).rstrip("/") + "/" for uri in (first, second))
    return a.startswith(b) or b.startswith(a)
