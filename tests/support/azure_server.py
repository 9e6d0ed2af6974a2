"""Azurite, Microsoft's own stand-in for Azure Blob Storage, on loopback: from npm, fetched once into `.cache/`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from expo_ray.storage import forget_stores
from expo_ray.storage.azure_store import EMULATED_ACCOUNT, EMULATED_KEY
from tests.support.paths import ROOT

VERSION = "3.37.0"
_FOLDER = ROOT / ".cache" / f"azurite-{VERSION}"
_PROGRAM = _FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
CONTAINER = "expo-ray"
READY_TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of a running server with one container."""
    _install()
    data_dir = tmp_path_factory.mktemp("azurite")
    with closing(socket.create_server(("127.0.0.1", 0))) as held:
        port = held.getsockname()[1]
    with (data_dir / "azurite.log").open("wb") as log:
        process = subprocess.Popen(
            ["node", str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(data_dir),
             "--silent", "--skipApiVersionCheck", "--disableTelemetry"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        endpoint = f"http://127.0.0.1:{port}/{EMULATED_ACCOUNT}"
        _make_container(endpoint, process, data_dir)
        yield f"AccountName={EMULATED_ACCOUNT};AccountKey={EMULATED_KEY};BlobEndpoint={endpoint}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def azure_uri(azurite: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder that no other test uses, reachable with this process's environment."""
    for variable in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite)
    forget_stores()
    yield f"az://{CONTAINER}/{uuid.uuid4().hex}"
    forget_stores()


def _install() -> None:
    """Fetch Azurite unless it is there; skip, and say so, where that is not possible."""
    if _PROGRAM.is_file():
        return
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip(
            "Azure is not tested: no node and npm to run Azurite; install them (Debian, Ubuntu: apt install npm)"
        )
    command = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--omit=optional",
        "--prefix",
        str(_FOLDER),
        f"azurite@{VERSION}",
    ]
    try:
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("Azure is not tested: npm took more than 300 s to fetch Azurite")
    if fetched.returncode:
        pytest.skip(f"Azure is not tested: npm could not fetch Azurite ({fetched.stderr.strip()[-300:]})")


def _make_container(endpoint: str, process: subprocess.Popen[bytes], data_dir: Path) -> None:
    """Wait for the server, and make the container, by a request signed with the account's key."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    import httpx

    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        signed = "\n".join(
            ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items()),
             f"/{EMULATED_ACCOUNT}/{EMULATED_ACCOUNT}/{CONTAINER}", "restype:container"]
        )  # fmt: skip
        digest = hmac.new(base64.b64decode(EMULATED_KEY), signed.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {EMULATED_ACCOUNT}:{base64.b64encode(digest).decode()}"
        try:
            answer = httpx.put(f"{endpoint}/{CONTAINER}?restype=container", headers=headers, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return
    pytest.fail(f"Azurite did not start: {(data_dir / 'azurite.log').read_text(errors='replace')[-1000:]}")
