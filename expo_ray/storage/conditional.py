"""True if a store keeps the one promise that cannot be had from the client's side."""

from __future__ import annotations

import uuid

from expo_ray.errors import AlreadyExists, StorageError
from expo_ray.storage.protocol import Store

# One that is left over, or another job's, is no part of a model.
PROBE_PREFIX = ".expo/probe-"


def check_conditional_writes(store: Store) -> None:
    """Find out that `put_if_absent` refuses a key that is taken; two jobs with one output rely on it.

    Writes a probe object beside the outputs, twice, and removes it.

    Raises:
        StorageError: if the store accepted the second write, or cannot be written at all.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    try:
        store.put_if_absent(key, b"first")
        store.put_if_absent(key, b"second")
    except AlreadyExists:
        return
    finally:
        store.delete(key)
    raise StorageError(
        f"{store.uri}: this store ignores `If-None-Match: *` and let a second writer overwrite the first; two jobs could mix their "
        "outputs unnoticed. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2, SeaweedFS do) or a local folder"
    )
