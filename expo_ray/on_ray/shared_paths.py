"""Local paths on a cluster of several machines: refused before any work, unless every machine sees the same files there.

Nothing says which folders are shared; so it is tried, as Ray Train does for its `storage_path`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expo_ray.errors import ExpoError, JobError, NotFound, Problems
from expo_ray.extrapolation.model_folder import ModelFolder, read_claim
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.storage import local_path
from expo_ray.storage.local import LocalStore
from expo_ray.storage.protocol import PROBE_PREFIX
from expo_ray.text import first_few

log = logging.getLogger("expo_ray")

OUTPUT = "output"
# A machine that does not answer for so long is left to those who wait for its work.
_ANSWER_S = 120.0

# Size and version of each file in a folder, by key.
Files = Mapping[str, tuple[int, str]]


def refuse_unshared(places: Mapping[str, str]) -> None:
    """Look from every other machine of the connected cluster whether it sees the files that this one sees.

    Args:
        places: paths and URIs that workers read, and the `output` that they write, by their names in the job file.

    Raises:
        Problems: if a machine does not see a local folder, or other files in it.
    """
    folders = {name: str(path) for name, uri in places.items() if (path := local_path(uri))}
    if not folders or not (others := _other_machines()):
        return
    with _probed(folders.get(OUTPUT)) as probe:
        here = {name: _list_files(folder, probe, name) for name, folder in folders.items()}
        seen = _ask_machines(others, folders, probe)
    problems: list[ExpoError] = []
    for name, folder in folders.items():
        blind = [address for address, files in seen.items() if files[name] != here[name]]
        if blind:
            problems.append(JobError(_refusal(name, folder, blind, len(others) + 1)))
    if problems:
        raise Problems(problems)


def refuse_unshared_output(plan: PairPlan, alphas: Sequence[float], driver: str) -> None:
    """On a worker: make sure that the outputs on a local path are those that the driver has claimed; this machine may be new.

    Args:
        driver: address of the driver's machine.

    Raises:
        JobError: if they are not.
    """
    if driver == ray.util.get_node_ip_address():
        return
    for folder in (ModelFolder(plan, alpha) for alpha in alphas):
        if folder.store.local_path is not None:
            try:
                read_claim(folder.store)
            except NotFound:
                raise JobError(
                    _refusal(OUTPUT, folder.store.uri, [ray.util.get_node_ip_address()], None)
                ) from None


def _refusal(name: str, folder: str, blind: Sequence[str], machines: int | None) -> str:
    many = (
        f"{len(blind)} of the cluster's {machines} machines" if machines else "one of the cluster's machines"
    )
    kind = "does not have" if len(blind) == 1 else "do not have"
    remedy = (
        "write to s3://" if name == OUTPUT else "put it into a store and name it by its URI (s3://, hf://)"
    )
    return (
        f"{name}: {folder} is a local path, and {many} {kind} the same files there ({first_few(list(blind))}); {remedy}, or use a file "
        "system that every machine mounts at this path (NFS, EFS, Lustre), or run on one machine with RAY_ADDRESS=local"
    )


def _other_machines() -> dict[str, str]:
    """A node of every machine but this one, by the machine's address."""
    here = ray.util.get_node_ip_address()
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {address: node for address, node in nodes.items() if address != here}


@contextmanager
def _probed(output: str | None) -> Iterator[str]:
    """Put a file into the output that only who shares it can see; yields its key. What was made is removed at the end."""
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    if output is None:
        yield key
        return
    made = [folder for folder in Path(output, key).parents if not folder.exists()]
    store = LocalStore(output)
    store.put(key, b"")
    try:
        yield key
    finally:
        store.delete(key)
        for folder in made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _list_files(folder: str, probe: str, name: str) -> Files:
    """List what must be the same on every machine: the probe of the output; of a parent, the versions that are planned."""
    store = LocalStore(folder)
    with suppress(ExpoError):
        if name == OUTPUT:
            return {probe: (store.stat(probe).size, "")}
        versions = name.startswith("pairs")  # other models may be copies
        return {info.key: (info.size, info.etag if versions else "") for info in store.list()}
    return {}


def _list_all(folders: Mapping[str, str], probe: str) -> Mapping[str, Files]:
    return {name: _list_files(folder, probe, name) for name, folder in folders.items()}


def _ask_machines(
    nodes: Mapping[str, str], folders: Mapping[str, str], probe: str
) -> dict[str, Mapping[str, Files]]:
    """Let a task on each machine list the folders; machines that do not answer are left out."""
    task = ray.remote(num_cpus=0, max_retries=0)(_list_all)
    asked = {
        address: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            folders, probe
        )
        for address, node in nodes.items()
    }
    ray.wait([*asked.values()], num_returns=len(asked), timeout=_ANSWER_S)
    seen: dict[str, Mapping[str, Files]] = {}
    for address, answer in asked.items():
        try:
            seen[address] = ray.get(answer, timeout=0)
        except RayError as error:
            log.warning(
                "%s does not say whether it has %s (%s)",
                address,
                first_few(list(folders)),
                type(error).__name__,
            )
    return seen
