"""Google Cloud Storage, asked in its XML language: the one in which a listing says the same of an object as its header."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from expo_ray.errors import StorageError
from expo_ray.storage.connection import (
    NO_RETRIES,
    PART_RETRIES,
    Cloud,
    Connection,
    reading_options,
    writing_options,
)
from expo_ray.storage.object_store import ObjectStore
from expo_ray.storage.pace import pace_of
from expo_ray.storage.uri import Scheme
from expo_ray.text import remember_secret, shown, shown_end

ENDPOINT = "https://storage.googleapis.com"
# Where Google's own libraries look for the address of an emulator, which needs no credentials.
EMULATOR = "STORAGE_EMULATOR_HOST"
_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_KINDS = ("service_account", "authorized_user")
_SECRETS = ("private_key", "private_key_id", "client_secret", "refresh_token")

GCS = Cloud(
    credentials=f"set {_KEY_FILE} to the key of a service account, run `gcloud auth application-default login`, or run where a service "
    "account is attached",
    rights="grant them storage.objects.list and storage.objects.get, and for outputs storage.objects.create, storage.objects.delete and "
    "storage.multipartUploads.create",
    endpoint=EMULATOR,
    certificates="add its authority to the certificates of this system",
)


class GcsStore(ObjectStore):
    """A folder of a bucket, `gs://bucket/folder`."""

    scheme: ClassVar[Scheme] = "gs"

    def _connect(self, bucket: str) -> Connection:
        return connect(bucket)


@cache
def connect(bucket: str) -> Connection:
    """Make the connection of this process to `bucket`; no request is sent to it yet.

    Raises:
        StorageError: without usable credentials or settings.
    """
    try:
        from obstore.store import GCSStore as Client
    except ImportError as error:
        raise StorageError(f"gs://{bucket}: obstore is not installed; pip install 'expo-ray[s3]'") from error
    endpoint, settings = _settings(bucket)
    http = endpoint.startswith("http://")
    reading, writing = reading_options(allow_http=http), writing_options(allow_http=http)
    try:
        return Connection(
            cloud=GCS,
            bucket=bucket,
            endpoint=endpoint,
            guarded=not http,
            reads=Client(bucket, client_options=reading, retry_config=NO_RETRIES, **settings),
            puts=Client(bucket, client_options=writing, retry_config=NO_RETRIES, **settings),
            uploads=Client(bucket, client_options=writing, retry_config=PART_RETRIES, **settings),
            pace=pace_of(f"{endpoint}/{bucket}"),
        )
    except Exception as error:  # obstore says in many ways what it cannot parse
        raise StorageError(f"gs://{bucket}: {shown_end(error, 500)}; {GCS.credentials}") from error


def _settings(bucket: str) -> tuple[str, dict[str, Any]]:
    """Address of the store, and options of obstore's client."""
    if emulator := os.environ.get(EMULATOR, "").strip().rstrip("/"):
        endpoint = emulator if "://" in emulator else f"http://{emulator}"
        # Not `skip_signature`: obstore 0.12 asks for a token nevertheless before it writes.
        return endpoint, {"base_url": endpoint, "bearer_token": "none"}
    options: dict[str, Any] = {"base_url": ENDPOINT}
    if path := os.environ.get(_KEY_FILE):
        options["application_credentials"] = _checked_key(bucket, Path(path).expanduser())
    return ENDPOINT, options


def _checked_key(bucket: str, path: Path) -> str:
    """`path` itself, if it holds credentials of a kind that obstore takes; what is secret in them is kept out of all output.

    Raises:
        StorageError: if it does not.
    """
    where = f"gs://{bucket}: {_KEY_FILE}: {path}"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in _SECRETS:
            remember_secret(str(content.get(name, "")))
        kind = content.get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{where} cannot be read ({type(error).__name__}); {GCS.credentials}") from error
    if kind not in _KINDS:
        raise StorageError(
            f"{where} holds credentials of the kind {shown(str(kind), 40)!r}, and only {' and '.join(_KINDS)} are taken; {GCS.credentials}"
        )
    return str(path)
