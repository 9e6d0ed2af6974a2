"""Fixtures around one SeaweedFS per test session."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.local_s3 import SeaweedFS
from expo_ray.storage import forget_stores


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A running server; a test that kills it starts it again."""
    data_dir = tmp_path_factory.mktemp("seaweedfs")
    with SeaweedFS(data_dir) as server:
        yield server
    shutil.rmtree(data_dir)  # a gigabyte that pytest would keep for three sessions


@pytest.fixture
def aws_environment(
    s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """The environment of this process, pointed at the server and at nothing of the user's."""
    environment = {
        **s3_server.environment,
        "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-aws-credentials"),
    }
    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL_S3",
        "AWS_CA_BUNDLE",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    yield environment
    forget_stores()


@pytest.fixture
def s3_uri(s3_server: SeaweedFS, aws_environment: dict[str, str]) -> str:
    """A folder that no other test uses, reachable with this process's environment."""
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def pending_uploads(s3_server: SeaweedFS) -> Any:
    """A function: the keys of all multipart uploads begun below a folder and neither completed nor aborted."""
    client = s3_server.client()

    def look(uri: str = "") -> list[str]:
        uploads = client.list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads", [])
        prefix = uri.removeprefix(f"s3://{s3_server.bucket}/")
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(prefix)]

    return look
