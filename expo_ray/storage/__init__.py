"""Folders of objects: local, S3, the Hub (read-only) and an in-memory twin, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Literal, assert_never

from expo_ray.config.fields import check_output
from expo_ray.errors import OutputError
from expo_ray.storage.local import LocalStore
from expo_ray.storage.memory import MemoryStore
from expo_ray.storage.pace import pace_of
from expo_ray.storage.protocol import FileInfo, Store, Writer, check_conditional_writes
from expo_ray.storage.uri import Scheme, join_uri, local_path, split_file, split_uri

__all__ = [
    "FileInfo",
    "Store",
    "Writer",
    "check_conditional_writes",
    "forget_stores",
    "join_uri",
    "local_path",
    "open_output",
    "open_output_file",
    "open_planned",
    "open_store",
    "split_file",
]


def open_store(uri: str) -> Store:
    """Return the store of this process for a folder, connected at its first use.

    Args:
        uri: a local path, `file:///path`, `s3://bucket/folder`, `gs://bucket/folder`, `az://container/folder`,
            `hf://org/name[@revision][/folder]` (read-only) or `memory://name/folder` (this process only).

    Raises:
        StorageError: for an unknown scheme, missing credentials, or a Hub repository that cannot be seen.
    """
    scheme, rest = split_uri(uri)
    path = local_path(uri)
    return _open(scheme, f"{scheme}://{rest.rstrip('/')}" if path is None else str(path))


def open_planned(uri: str, files: Mapping[str, FileInfo]) -> Store:
    """Return the store of a folder that was looked at while planning; the Hub is not asked for commit and files again.

    A thousand tasks would ask at the same time, and the Hub allows a few hundred such questions in five minutes.

    Args:
        uri: as the store that listed the folder named itself, with the commit of a Hub repository.
        files: those that will be read. The store may know no others.

    Raises:
        StorageError: as `open_store`.
    """
    if split_uri(uri)[0] != "hf" or uri in _looked_up:
        return open_store(uri)
    return _open_planned(uri, tuple(files.values()))


def open_output(uri: str) -> Store:
    """Return the store of a folder to write into; see `open_store`.

    Raises:
        OutputError: for the Hub, which is not even asked whether it has such a repository.
    """
    try:
        return open_store(check_output(uri))
    except ValueError as error:
        raise OutputError(str(error)) from error


def open_output_file(uri: str) -> tuple[Store, str]:
    """Return the store and the key of a file to write.

    Raises:
        OutputError: for a file on the Hub.
        StorageError: if `uri` names no file.
    """
    folder, name = split_file(uri)
    return open_output(folder), name


def forget_stores() -> None:
    """Let the next `open_store` read the environment and its credentials anew."""
    from expo_ray.storage.azure_store import connect as connect_azure
    from expo_ray.storage.gcs_store import connect as connect_gcs
    from expo_ray.storage.s3_connection import connect as connect_s3

    _open.cache_clear()
    _open_planned.cache_clear()
    _looked_up.clear()
    for connect in (connect_azure, connect_gcs, connect_s3):
        connect.cache_clear()
    pace_of.cache_clear()


@cache
def _open(scheme: Scheme, uri: str) -> Store:
    # The libraries of a store take seconds to import, and may not be installed.
    match scheme:
        case "file":
            return LocalStore(uri)
        case "memory":
            return MemoryStore(uri)
        case "s3" | "gs" | "az":
            return _store_of(scheme)(uri)
        case "hf":
            from expo_ray.storage.hub import HubStore

            if uri in _looked_up:
                return _looked_up[uri]
            store = HubStore(uri)
            return _looked_up.setdefault(store.uri, store)  # a plan names it with its commit
    assert_never(scheme)


def _store_of(cloud: Literal["s3", "gs", "az"]) -> Callable[[str], Store]:
    """The class of the stores of a cloud."""
    match cloud:
        case "s3":
            from expo_ray.storage.s3_store import S3Store

            return S3Store
        case "gs":
            from expo_ray.storage.gcs_store import GcsStore

            return GcsStore
        case "az":
            from expo_ray.storage.azure_store import AzureStore

            return AzureStore
    assert_never(cloud)


# Repositories of the Hub that this process has looked at, by their URI with the commit.
_looked_up: dict[str, Store] = {}


@lru_cache(maxsize=64)
def _open_planned(uri: str, files: tuple[FileInfo, ...]) -> Store:
    from expo_ray.storage.hub import HubStore

    return HubStore(uri, {info.key: info for info in files})
