"""Settings of Google Cloud Storage and Azure, as their own tools take them, and what is said where they do not do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from expo_ray.cli.process import main
from expo_ray.errors import NotFound, StorageError
from expo_ray.storage import azure_store, forget_stores, gcs_store, open_store
from expo_ray.text import redact
from tests.support.pairs import write_pair

KEY = "c2VjcmV0LWtleS1vZi10aGUtYWNjb3VudA=="


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in [
        name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_EMULATOR"))
    ]:
        monkeypatch.delenv(variable)
    forget_stores()
    yield
    forget_stores()


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({"AZURE_STORAGE_ACCOUNT": "lab", "AZURE_STORAGE_KEY": KEY}, "https://lab.blob.core.windows.net"),
        ({"AZURE_STORAGE_ACCOUNT": "lab", "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=hush"}, "https://lab.blob.core.windows.net"),
        ({"AZURE_STORAGE_ACCOUNT_NAME": "lab"}, "https://lab.blob.core.windows.net"),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=https;AccountName=lab;AccountKey={KEY};"
             "EndpointSuffix=core.chinacloudapi.cn"},
            "https://lab.blob.core.chinacloudapi.cn",
        ),
        # The connection string wins, as in Azure's own tools.
        (
            {"AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://lab.example/;AccountName=lab;SharedAccessSignature=sv=1&sig=hush",
             "AZURE_STORAGE_ACCOUNT": "other", "AZURE_STORAGE_KEY": KEY},
            "https://lab.example",
        ),
        ({"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"}, "http://127.0.0.1:10000/devstoreaccount1"),
    ],
)  # fmt: skip
def test_the_environment_names_the_azure_account(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], endpoint: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    connection = azure_store.connect("box")
    assert connection.endpoint == endpoint
    assert connection.guarded == endpoint.startswith("https")
    assert connection.reads.config["account_name"] in {"lab", "devstoreaccount1"}
    assert "hush" not in redact("sv=1&sig=hush")
    if KEY in str(environment):
        assert KEY not in redact(f"a request with {KEY}")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "no storage account is named; set AZURE_STORAGE_CONNECTION_STRING"),
        ({"AZURE_STORAGE_ACCOUNT": "lab", "AZURE_STORAGE_KEY": "no base64!"}, "the key of the account lab is no base64"),
        ({"AZURE_STORAGE_CONNECTION_STRING": "copied-wrongly"}, "AZURE_STORAGE_CONNECTION_STRING is no list of"),
    ],
)  # fmt: skip
def test_azure_settings_that_cannot_do_are_named_with_their_remedy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as caught:
        open_store("az://box/folder")
    assert words in str(caught.value)
    assert "no base64!" not in str(caught.value)
    assert "copied-wrongly" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:4443", "http://127.0.0.1:4443/"])
def test_the_emulator_of_google_is_asked_without_credentials(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    connection = gcs_store.connect("bucket")
    assert (connection.endpoint, connection.guarded) == ("http://127.0.0.1:4443", False)


def test_google_is_asked_over_tls_with_the_named_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text(
        json.dumps(
            {
                "type": "authorized_user",
                "client_id": "c",
                "client_secret": "hush-hush-hush-1",
                "refresh_token": "hush-hush-hush-2",
            }
        )
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    connection = gcs_store.connect("bucket")
    assert (connection.endpoint, connection.guarded) == ("https://storage.googleapis.com", True)
    assert redact("hush-hush-hush-1 hush-hush-hush-2").count("hush") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        (
            '{"type": "external_account"}',
            "'external_account', and only service_account and authorized_user are taken",
        ),
        ('{"type": "service_account", "private_key": "x"}', "gcloud auth application-default login"),
    ],
)
def test_a_key_of_google_that_cannot_do_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "key.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(StorageError) as caught:
        open_store("gs://bucket/folder")
    assert words in str(caught.value)
    assert "gs://bucket" in str(caught.value)


@pytest.mark.s3
@pytest.mark.parametrize("cloud", ["gcs", "azure"])
def test_a_missing_bucket_and_wrong_credentials_are_named(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cloud: str
) -> None:
    uri = str(request.getfixturevalue(f"{cloud}_uri"))
    scheme = uri.partition("://")[0]
    with pytest.raises(NotFound, match="there is no bucket 'nobody-made-it'"):
        open_store(f"{scheme}://nobody-made-it/x").list()
    if cloud == "azure":
        text = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text.replace(azure_store.EMULATED_KEY, KEY))
        forget_stores()
        with pytest.raises(StorageError, match=r"AZURE_STORAGE_KEY|Storage Blob Data Reader"):
            open_store(uri).put("x", b"x")


@pytest.mark.s3
@pytest.mark.parametrize("cloud", ["gcs", "azure"])
def test_an_upload_that_is_given_up_is_never_seen(request: pytest.FixtureRequest, cloud: str) -> None:
    store = open_store(str(request.getfixturevalue(f"{cloud}_uri")))
    data = os.urandom(40 << 20)
    with store.writer("model.bin", len(data)) as writer:
        writer.write(data[: 30 << 20])
    assert store.list() == []
    with store.writer("model.bin", len(data)) as writer:
        writer.write(data)
        writer.commit()
    assert store.read("model.bin") == data


@pytest.mark.s3
@pytest.mark.parametrize("cloud", ["gcs", "azure"])
def test_a_pair_in_a_cloud_is_extrapolated_verified_and_has_the_bytes_of_a_local_one(
    request: pytest.FixtureRequest, tmp_path: Path, cloud: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(request.getfixturevalue(f"{cloud}_uri"))
    for side in write_pair(tmp_path, sft_shards=2, dpo_shards=2):
        store = open_store(f"{uri}/{side.name}")
        for file in side.iterdir():
            store.put(file.name, file.read_bytes())
    for root in (uri, str(tmp_path)):
        words = ["--sft", f"{root}/sft", "--dpo", f"{root}/dpo", "--alpha", "0.5", "--output", f"{root}/out"]
        assert main(["extrapolate", *words]) == 0, capsys.readouterr().err
        assert main(["verify", f"{root}/out", "--sft", f"{root}/sft", "--dpo", f"{root}/dpo"]) == 0
    here, there = open_store(str(tmp_path / "out")), open_store(f"{uri}/out")
    files = [info.key for info in here.list() if info.key.endswith(".safetensors")]
    assert files
    for key in files:
        assert there.read(key) == here.read(key)
    manifest = json.loads(there.read("expo.json"))
    guards = [file["guard"] for file in manifest["parents"]["dpo"]["files"].values() if "guard" in file]
    assert set(guards) == {"not verified"}  # over plain http, and without checksums that obstore shows
