"""The folder of one model: whose it is, what of it is there, and who may write into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from expo_ray.config import format_alpha
from expo_ray.errors import AlreadyExists, ExpoError, NotFound, OutputError, some
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import read_receipt
from expo_ray.storage import Store, open_store

CLAIM = ".expo/claim.json"
MANIFEST = "expo.json"


@dataclass(frozen=True)
class OutputState:
    """What a rerun finds.

    Attributes:
        published: the whole model is there, of this very plan.
        done: files of the shards that need not be written again.
        stale: the folder holds another plan's model, which was asked to be overwritten.
    """

    published: bool = False
    done: frozenset[str] = frozenset()
    stale: bool = False


def inspect_output(plan: PairPlan, alpha: float, *, overwrite: bool) -> OutputState:
    """Look, without writing, at the folder where the model of `alpha` shall go.

    Raises:
        OutputError: if the folder is a parent's, or holds something that is not to be overwritten.
    """
    uri = plan.outputs[alpha]
    for side, parent in (("sft", plan.sft.uri), ("dpo", plan.dpo.uri)):
        if _overlap(uri, parent):
            raise OutputError(
                f"output {uri} and {side} {parent} lie in each other; choose another output folder"
            )
    store = open_store(uri)
    present = {info.key: info for info in store.list()}
    if not present:
        return OutputState()
    if CLAIM not in present:
        raise OutputError(
            f"output {uri} holds other files ({some(list(present), 3)}); choose an empty or new folder"
        )
    holder = claimed_by(store)
    if overwrite:
        return OutputState(stale=True)
    if holder != plan.plan_id(alpha):
        raise OutputError(
            f"output {uri} holds the model of another plan ({holder}; this one is {plan.plan_id(alpha)}): other parents, "
            f"alpha or options; choose another output folder, or replace it with --overwrite"
        )
    done = (read_receipt(store, holder, shard.file, present) for shard in plan.shards)
    return OutputState(MANIFEST in present, frozenset(receipt.file for receipt in done if receipt))


def claim(plan: PairPlan, alpha: float) -> None:
    """Reserve the output folder for this plan; a run of the same plan joins.

    Raises:
        OutputError: if another plan was faster.
    """
    store = open_store(plan.outputs[alpha])
    text = json.dumps({"plan": plan.plan_id(alpha)})
    try:
        store.put_if_absent(CLAIM, text.encode())
    except AlreadyExists as error:
        raise OutputError(
            f"output {store.uri} was claimed by another job (plan {claimed_by(store)}, this one is {plan.plan_id(alpha)}) "
            f"for alpha {format_alpha(alpha)}; choose another output folder"
        ) from error


def claimed_by(store: Store) -> str:
    """The id of the plan that holds the folder."""
    try:
        return str(json.loads(store.read(CLAIM))["plan"])
    except (NotFound, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{store.uri}/{CLAIM} cannot be read ({error}); delete the folder and run again"
        ) from error


def clear(store: Store) -> None:
    """Delete a model that was claimed, the manifest first, so that at no moment a torn model looks whole."""
    keys = [info.key for info in store.list()]
    for key in sorted(keys, key=lambda key: (key != MANIFEST, key == CLAIM, key)):
        store.delete(key)


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
        stat = os.statvfs(place)
        free = stat.f_bavail * stat.f_frsize
        if size > free:
            problems.append(
                OutputError(f"{place}: {size / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; free space or choose another output")
            )  # fmt: skip
    return problems


def local_folder(uri: str) -> str | None:
    """The path of a local store's folder, None for any other store."""
    return (
        None
        if "://" in uri and not uri.startswith("file://")
        else os.path.realpath(uri.removeprefix("file://"))
    )


def _existing(folder: str) -> str:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _overlap(first: str, second: str) -> bool:
    a, b = ((local_folder(uri) or uri).rstrip("/") + "/" for uri in (first, second))
    return a.startswith(b) or b.startswith(a)
