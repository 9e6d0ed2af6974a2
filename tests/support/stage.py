"""A stage for whole jobs: a pair in the bucket, an output, a proxy on the way, and the models that the local command makes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.local_s3 import SeaweedFS
from tests.support.pairs import expo, moved, write_both
from tests.support.slow_proxy import SlowProxy

ALPHAS = (0.3, 0.5)
SHARDS = 4
SHARD_SIZE = "9500kB"
OPTIONS = {"alphas": list(ALPHAS), "shard_size": SHARD_SIZE}
# Three to a shard, which is then more than one part of a multipart upload.
_SHAPE = (1536, 1024)

# Requests that a job makes for the shards of its models.
BEGIN = ("POST", r"/model-\d+-of-\d+\.safetensors\?uploads")
PART = ("PUT", r"/model-\d+-of-\d+\.safetensors\?.*partNumber")
RECEIPT = ("PUT", r"/\.expo/\w+/model-")


@dataclass(frozen=True)
class StoredPair:
    """Parents in S3, and the digests of the models that the local command made of them, by alpha and file."""

    sft: str
    dpo: str
    digests: Mapping[float, Mapping[str, str]]


@dataclass(frozen=True)
class Stage:
    """The folder of a test in the bucket.

    Attributes:
        uri: the output of the test's jobs.
        way: the proxy between all that runs and the server.
        pending: the keys of unfinished multipart uploads below a URI.
    """

    server: SeaweedFS
    way: SlowProxy
    uri: str
    pair: StoredPair
    folder: Path
    pending: Callable[[str], list[str]]

    def job_file(self, **changes: Any) -> Path:
        """A job of the pair under the name `big`; `pairs` adds others as name and URIs of both parents."""
        others = changes.pop("pairs", {})
        pairs = {"big": (self.pair.sft, self.pair.dpo), **others}
        data = {
            "output": changes.pop("output", self.uri),
            "defaults": {**OPTIONS, **changes},
            "pairs": [{"name": name, "sft": sft, "dpo": dpo} for name, (sft, dpo) in pairs.items()],
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    def model(self, alpha: float, pair: str = "big") -> str:
        return f"{self.uri}/pairs/{pair}/alpha={alpha}"

    def listed(self, uri: str = "") -> dict[str, dict[str, Any]]:
        """List the objects below a URI, by the rest of the key."""
        prefix = (uri or self.uri).removeprefix(f"s3://{self.server.bucket}/").rstrip("/") + "/"
        pages = (
            _client(self.server)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.server.bucket, Prefix=prefix)
        )
        return {
            stored["Key"].removeprefix(prefix): stored
            for page in pages
            for stored in page.get("Contents", [])
        }

    def shown(self) -> list[str]:
        """The models that readers trust."""
        return [key.removesuffix("/expo.json") for key in self.listed() if key.endswith("/expo.json")]

    def receipts(self) -> list[str]:
        return [key for key in self.listed() if re.search("/.expo/.*/model-", key)]

    def unfinished(self) -> list[str]:
        """Shards of which an upload was begun, and neither completed nor aborted; once for each such upload."""
        return sorted(map(_shard, self.pending(self.uri)))

    def begun_again(self) -> dict[str, int]:
        """Count how often shards of the pair were begun after the first time, over all runs; those never begun are left out."""
        times = Counter[str]()
        for path, count in self.way.count(*BEGIN).items():
            times[_shard(path)] = max(times[_shard(path)], count)
        return {name: count - 1 for name, count in times.items() if count > 1}

    def status(self) -> dict[str, Any]:
        """`status.json`."""
        if "status.json" not in self.listed():
            return {"state": "not there"}
        data: dict[str, Any] = json.loads(fetch(self.server, f"{self.uri}/status.json"))
        return data

    def files(self, uri: str) -> dict[str, str]:
        """Digest of every file of a stored model that does not tell where its parents lay."""
        return {
            key: hashlib.sha256(fetch(self.server, f"{uri}/{key}")).hexdigest()
            for key in self.listed(uri)
            if _comparable(key)
        }

    def complete(self, *alphas: float) -> bool:
        """True if the models of the pair are there, with the bytes that the local command wrote."""
        return all(
            self.files(self.model(alpha)) == self.pair.digests[alpha]
            and "expo.json" in self.listed(self.model(alpha))
            for alpha in alphas or ALPHAS
        )


@pytest.fixture(scope="session")
def stored_pair(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> StoredPair:
    folder = tmp_path_factory.mktemp("big")
    generator = torch.Generator().manual_seed(3)
    sft = {
        f"layer.{index:02}.weight": (torch.randn(_SHAPE, generator=generator) * 0.05).bfloat16()
        for index in range(3 * SHARDS)
    }
    local = write_both(folder, sft, moved(sft), sft_shards=2, dpo_shards=3)
    options = f"--shard-size {SHARD_SIZE}"
    assert expo(*local, folder / "out", *ALPHAS, rounding="stochastic", more=options) == 0
    digests = {alpha: digests_of(folder / "out" / f"alpha={alpha}") for alpha in ALPHAS}
    sft_uri, dpo_uri = (upload(s3_server, parent, f"big/{parent.name}") for parent in local)
    return StoredPair(sft_uri, dpo_uri, digests)


@pytest.fixture(scope="session")
def gateway(s3_server: SeaweedFS) -> Iterator[SlowProxy]:
    """The way of everything that is tested to the S3 server."""
    with SlowProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def through_gateway(s3_server: SeaweedFS, gateway: SlowProxy) -> dict[str, str]:
    """Environment of a process whose requests pass the gateway."""
    return {
        **s3_server.environment,
        "AWS_ENDPOINT_URL": gateway.endpoint,
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }


@pytest.fixture
def stage(
    gateway: SlowProxy, stored_pair: StoredPair, s3_uri: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Stage]:
    gateway.release()
    gateway.inject()
    server = request.getfixturevalue("s3_server")
    yield Stage(server, gateway, s3_uri, stored_pair, tmp_path, request.getfixturevalue("pending_uploads"))
    gateway.release()
    gateway.inject()


def upload(server: SeaweedFS, folder: Path, prefix: str) -> str:
    """Copy a local folder into the bucket; its URI."""
    client = _client(server)
    for file in folder.iterdir():
        client.put_object(Bucket=server.bucket, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    return f"s3://{server.bucket}/{prefix}"


def fetch(server: SeaweedFS, uri: str) -> bytes:
    """Read a stored object, not by way of the proxy."""
    key = uri.removeprefix(f"s3://{server.bucket}/")
    data: bytes = _client(server).get_object(Bucket=server.bucket, Key=key)["Body"].read()
    return data


def digests_of(folder: Path) -> dict[str, str]:
    """As `Stage.files`, of a local folder."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items() if _comparable(key)
    }


@cache
def _client(server: SeaweedFS) -> Any:
    """Making one takes a third of a second."""
    return server.client()


def _shard(path: str) -> str:
    return path.rpartition("/")[2].partition("-of-")[0]


def _comparable(key: str) -> bool:
    return not key.startswith(".expo/") and key not in {"README.md", "expo.json"}
