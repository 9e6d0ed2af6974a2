"""Parents read once over plain http: a flipped bit is found wherever it strikes, and what nobody could find is said."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.local_s3 import SeaweedFS
from expo_ray.extrapolation import read_ahead, stream
from expo_ray.storage import forget_stores, open_store
from expo_ray.storage.checksums import RangeChecksum, checksum_of, joined, parse_checksum
from expo_ray.storage.s3_store import S3Store
from tests.support.fault_proxy import Action, Fault, FaultProxy
from tests.support.pairs import expo, moved, write_both
from tests.support.stage import digests_of

pytest.importorskip("awscrt", reason="checksums of S3 objects need awscrt, which expo-ray[s3] installs")

KINDS = {"CRC64NVME": "CRC64NVME", "CRC32C": "CRC32C", "CRC32": "CRC32"}


# --- checksums of objects that were uploaded in parts


def upload_in_parts(server: SeaweedFS, uri: str, parts: list[bytes], algorithm: str) -> list[dict[str, Any]]:
    """Upload an object as boto3 does; returns its parts as AWS lists them."""
    client, key = server.client(), f"{uri.partition(server.bucket)[2].strip('/')}/model"
    named = {"Bucket": server.bucket, "Key": key}
    upload = client.create_multipart_upload(**named, ChecksumAlgorithm=algorithm)["UploadId"]
    sent = []
    for number, data in enumerate(parts, 1):
        answer = client.upload_part(
            **named, UploadId=upload, PartNumber=number, Body=data, ChecksumAlgorithm=algorithm
        )
        sent.append(
            {
                "PartNumber": number,
                "ETag": answer["ETag"],
                f"Checksum{algorithm}": answer[f"Checksum{algorithm}"],
            }
        )
    client.complete_multipart_upload(**named, UploadId=upload, MultipartUpload={"Parts": sent})
    return [part | {"Size": len(data)} for part, data in zip(sent, parts, strict=True)]


@pytest.mark.s3
@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C"])
def test_checksums_of_parts_combine_into_that_of_the_file(
    s3_uri: str, s3_server: SeaweedFS, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(3).randbytes(11 << 20)
    parts = [data[: 5 << 20], data[5 << 20 : 10 << 20], data[10 << 20 :]]
    listed = upload_in_parts(s3_server, s3_uri, parts, algorithm)
    store = open_store(s3_uri)
    assert isinstance(store, S3Store)
    info = store.stat("model")
    assert store.checksum(info) is None  # SeaweedFS lists parts without their checksums
    # AWS lists them, in pages: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObjectAttributes.html
    pages = {0: (listed[:2], True), 2: (listed[2:], False)}

    def attributes(*, PartNumberMarker: int = 0, **_: Any) -> dict[str, Any]:
        page, more = pages[PartNumberMarker]
        return {
            "ETag": info.etag.strip('"'),
            "ObjectParts": {
                "Parts": page,
                "IsTruncated": more,
                "NextPartNumberMarker": page[-1]["PartNumber"],
            },
        }

    monkeypatch.setattr(store._connection.headers, "get_object_attributes", attributes)
    known = store.checksum(info)
    assert known is not None
    assert (known.algorithm, known.value) == (algorithm, checksum_of(algorithm, memoryview(data)))
    # One that is missing, or parts of another version of the object: nothing is compared with them.
    del listed[1][f"Checksum{algorithm}"]
    assert store.checksum(info) is None
    assert store.checksum(replace(info, etag='"other"')) is None


# --- arithmetic of checksums


@pytest.mark.parametrize("algorithm", KINDS)
def test_checksums_of_ranges_join_into_that_of_the_whole(algorithm: str) -> None:
    data = random.Random(1).randbytes(100_000)
    cuts = [0, 1, 4096, 50_001, 99_999, 100_000]
    parts = [
        RangeChecksum(start, end, checksum_of(algorithm, memoryview(data)[start:end]))
        for start, end in itertools.pairwise(cuts)
    ]
    random.Random(2).shuffle(parts)
    assert joined(algorithm, parts) == [RangeChecksum(0, 100_000, checksum_of(algorithm, memoryview(data)))]
    del parts[0]
    assert len(joined(algorithm, parts)) in {1, 2}
    assert joined(algorithm, parts)[0] != joined(algorithm, parts[1:])[0]


def test_a_checksum_of_parts_is_not_taken_for_one_of_the_whole() -> None:
    assert parse_checksum("CRC32", "Zt0vlQ==-3") is None
    assert parse_checksum("CRC32", "Zt0vlQ==") is not None
    assert parse_checksum("CRC64NVME", "Zt0vlQ==") is None


# --- whole jobs through a proxy that flips bits


class Pair:
    """A pair of three blocks a parent, in the bucket, and what the local command makes of it."""

    def __init__(self, server: SeaweedFS, folder: Path, uri: str, **checksum: str) -> None:
        generator = torch.Generator().manual_seed(4)
        sft = {
            f"layer.{index}.weight": (torch.randn(96, 1024, generator=generator) * 0.05).bfloat16()
            for index in range(6)
        }
        self.local = write_both(folder, sft, moved(sft))
        self.uri = uri
        client = server.client()
        for side in self.local:
            for file in side.iterdir():
                key = f"{uri.removeprefix(f's3://{server.bucket}/')}/{side.name}/{file.name}"
                client.put_object(Bucket=server.bucket, Key=key, Body=file.read_bytes(), **checksum)
        assert expo(*self.local, folder / "local", 0.3, more="--shard-size 400kB") == 0
        self.digests = digests_of(folder / "local")

    def run(self) -> int:
        side = f"{self.uri}/{{}}".format
        return expo(side("sft"), side("dpo"), f"{self.uri}/out", 0.3, more="--shard-size 400kB")

    def manifest(self) -> Any:
        return json.loads(open_store(f"{self.uri}/out").read("expo.json"))

    def guards(self) -> set[str]:
        return {
            file["guard"]
            for side in self.manifest()["parents"].values()
            for key, file in side["files"].items()
            if key.endswith(".safetensors")
        }


@pytest.fixture
def way(s3_server: SeaweedFS, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 100_000)
    for module in (read_ahead, stream):
        monkeypatch.setattr(module, "CHUNK_BYTES", 30_000)
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_stores()
        yield proxy


@pytest.mark.s3
@pytest.mark.parametrize("algorithm", KINDS)
def test_parents_are_read_once_and_compared_with_the_checksum_of_their_store(
    s3_server: SeaweedFS, s3_uri: str, way: FaultProxy, tmp_path: Path, algorithm: str
) -> None:
    pair = Pair(s3_server, tmp_path, s3_uri, ChecksumAlgorithm=algorithm)
    way.inject()
    assert pair.run() == 0
    assert pair.guards() == {algorithm}
    assert not [line for line in pair.manifest()["warnings"] if "checksum" in line]


# Where in the file the bit flips: counted in reads of weights, of which each file has twelve.
@pytest.mark.s3
@pytest.mark.parametrize("place", [("sft", 0), ("sft", 11), ("dpo", 0), ("dpo", 5), ("dpo", 11)])
def test_a_flipped_bit_is_found_and_its_shards_are_written_again(  # noqa: PLR0917 - fixtures
    s3_server: SeaweedFS,
    s3_uri: str,
    way: FaultProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: tuple[str, int],
) -> None:
    side, read = place
    pair = Pair(s3_server, tmp_path, s3_uri, ChecksumAlgorithm="CRC64NVME")
    way.inject(Fault(Action.FLIP_READ, "GET", f"/{side}/model", skip=HEADER_READS + read))
    assert pair.run() == 0
    assert [entry[0] for entry in way.log] == [Action.FLIP_READ]
    assert "bits flipped on their way" in caplog.text
    stored = open_store(f"{pair.uri}/out")
    written = {key for key in pair.digests if key.endswith(".safetensors")}
    manifest = {shard["file"]: shard["sha256"] for shard in pair.manifest()["shards"]}
    assert manifest == {key: pair.digests[key] for key in written}
    assert {key: hashlib.sha256(stored.read(key)).hexdigest() for key in written} == manifest


# Of planning, which compares two readings of a header.
HEADER_READS = 2


@pytest.mark.s3
def test_bits_that_flip_without_end_fail_the_model_and_name_the_remedy(
    s3_server: SeaweedFS, s3_uri: str, way: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair(s3_server, tmp_path, s3_uri, ChecksumAlgorithm="CRC64NVME")
    way.inject(Fault(Action.FLIP_READ, "GET", "/sft/model", skip=HEADER_READS, times=1_000_000))
    assert pair.run() == 1
    assert "EXPO_RAY_READ_TWICE=1" in capsys.readouterr().err
    assert "expo.json" not in {info.key for info in open_store(f"{pair.uri}/out").list()}
    way.inject()
    assert pair.run() == 0
    assert pair.guards() == {"CRC64NVME"}


@pytest.mark.s3
def test_what_a_store_without_checksums_gets(
    s3_server: SeaweedFS, s3_uri: str, way: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(s3_server, tmp_path, s3_uri, ChecksumAlgorithm="SHA256")  # ranges do not combine into it
    assert pair.run() == 0
    assert pair.guards() == {"not verified"}
    (warning,) = [line for line in pair.manifest()["warnings"] if "plain http" in line]
    assert "EXPO_RAY_READ_TWICE=1" in warning
    monkeypatch.setenv("EXPO_RAY_READ_TWICE", "1")
    again = Pair(s3_server, tmp_path / "again", f"{s3_uri}-again", ChecksumAlgorithm="SHA256")
    way.inject(Fault(Action.FLIP_READ, "GET", "/dpo/model", skip=HEADER_READS + 3))
    assert again.run() == 0
    assert again.guards() == {"read twice"}
    assert again.manifest()["shards"] == pair.manifest()["shards"]
