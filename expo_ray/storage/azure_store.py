"""Azure Blob Storage: containers of one storage account, which the environment names as it does for `az storage`."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from functools import cache
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
from expo_ray.text import remember_secret, shown_end

_CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
# Public: every installation of Azurite has them.
EMULATED_ACCOUNT = "devstoreaccount1"
EMULATED_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_EMULATOR = f"http://127.0.0.1:10000/{EMULATED_ACCOUNT}"

AZURE = Cloud(
    credentials=f"set {_CONNECTION_STRING}; or AZURE_STORAGE_ACCOUNT, with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, with "
    "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or where a managed identity is attached",
    rights="grant them the role Storage Blob Data Reader, and for outputs Storage Blob Data Contributor",
    endpoint="AZURE_STORAGE_ENDPOINT",
    certificates="add its authority to the certificates of this system",
)


class AzureStore(ObjectStore):
    """A folder of a container, `az://container/folder`."""

    scheme: ClassVar[Scheme] = "az"

    def _connect(self, bucket: str) -> Connection:
        return connect(bucket)


@dataclass(frozen=True)
class _Account:
    """A storage account, as the environment names it; key and sas are empty where others say who asks."""

    name: str
    key: str
    sas: str
    endpoint: str


@cache
def connect(container: str) -> Connection:
    """Make the connection of this process to `container`; no request is sent to it yet.

    Raises:
        StorageError: without usable credentials or settings.
    """
    try:
        from obstore.store import AzureStore as Client
    except ImportError as error:
        raise StorageError(
            f"az://{container}: obstore is not installed; pip install 'expo-ray[s3]'"
        ) from error
    account = _account(container)
    settings: dict[str, Any] = {"account_name": account.name, "endpoint": account.endpoint}
    settings |= {"account_key": account.key} if account.key else {}
    settings |= {"sas_key": account.sas} if account.sas and not account.key else {}
    http = account.endpoint.startswith("http://")
    reading, writing = reading_options(allow_http=http), writing_options(allow_http=http)
    try:
        return Connection(
            cloud=AZURE,
            bucket=container,
            endpoint=account.endpoint,
            guarded=not http,
            reads=Client(container, client_options=reading, retry_config=NO_RETRIES, **settings),
            puts=Client(container, client_options=writing, retry_config=NO_RETRIES, **settings),
            uploads=Client(container, client_options=writing, retry_config=PART_RETRIES, **settings),
            pace=pace_of(f"{account.endpoint}/{container}"),
        )
    except Exception as error:  # obstore says in many ways what it cannot parse
        raise StorageError(f"az://{container}: {shown_end(error, 500)}; {AZURE.credentials}") from error


def _account(container: str) -> _Account:
    """The account that the environment names, as `az storage` and Azure's libraries read it.

    Raises:
        StorageError: if it names none, or a key that is none.
    """
    given = _connection_string(container)
    name = given.get("accountname") or _first("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
    key = given.get("accountkey") or (
        "" if given else _first("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY")
    )
    sas = given.get("sharedaccesssignature") or ("" if given else _first("AZURE_STORAGE_SAS_TOKEN"))
    endpoint = given.get("blobendpoint") or _first("AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_SERVICE_ENDPOINT")
    if given.get("usedevelopmentstorage", "").lower() == "true":
        name, key, endpoint = EMULATED_ACCOUNT, EMULATED_KEY, endpoint or _EMULATOR
    for secret in (key, sas.lstrip("?")):
        remember_secret(secret)
    if not name:
        raise StorageError(f"az://{container}: no storage account is named; {AZURE.credentials}")
    if key and not _is_base64(key):
        raise StorageError(
            f"az://{container}: the key of the account {name} is no base64; copy it again from the account's access keys"
        )
    if not endpoint:
        protocol = given.get("defaultendpointsprotocol", "https")
        endpoint = f"{protocol}://{name}.blob.{given.get('endpointsuffix', 'core.windows.net')}"
    return _Account(name, key, sas.lstrip("?"), endpoint.rstrip("/"))


def _connection_string(container: str) -> dict[str, str]:
    """The settings in the connection string, by their names in lower case; empty if there is none."""
    text = os.environ.get(_CONNECTION_STRING, "").strip()
    parts = [part.partition("=") for part in text.split(";") if part.strip()]
    if any(not equals for _, equals, _ in parts):
        remember_secret(text)
        raise StorageError(
            f"az://{container}: {_CONNECTION_STRING} is no list of `Name=value` with `;` between; copy it again from the account's access keys"
        )
    return {name.strip().lower(): value.strip() for name, _, value in parts}


def _first(*variables: str) -> str:
    """The first of these variables that is set; empty if none is."""
    return next(filter(None, (os.environ.get(variable, "").strip() for variable in variables)), "")


def _is_base64(key: str) -> bool:
    try:
        return bool(base64.b64decode(key, validate=True))
    except binascii.Error:
        return False
