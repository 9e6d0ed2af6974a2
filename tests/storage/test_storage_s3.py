"""S3 settings are taken as every AWS tool takes them, and reads are guarded where the connection does not guard them."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

from examples.local_s3 import ACCESS_KEY, SECRET_KEY, SeaweedFS
from expo_ray.errors import NotFound, StorageError
from expo_ray.storage import connection, forget_stores, open_store
from expo_ray.storage.s3_connection import connect
from tests.support.fault_proxy import FaultProxy

CONFIG = """
[profile work]
region = eu-central-1
services = local
[services local]
s3 =
  endpoint_url = {endpoint}
[profile virtual]
s3 =
  addressing_style = virtual
[profile path]
s3 =
  addressing_style = path
"""
CREDENTIALS = """
[{name}]
aws_access_key_id = {key}
aws_secret_access_key = {secret}
"""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No AWS setting but two keys."""
    import os

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    forget_stores()
    yield monkeypatch
    forget_stores()


def test_amazon_is_the_default_and_is_reached_by_tls(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("AWS_REGION", "eu-west-1")
    connection = connect("bucket")
    assert connection.endpoint == "https://bucket.s3.eu-west-1.amazonaws.com"
    assert connection.guarded
    assert connect("bucket.with.dots").endpoint == "https://s3.eu-west-1.amazonaws.com"


@pytest.mark.parametrize(
    ("settings", "endpoint"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "http://127.0.0.1:9000"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b:1/base"}, "http://b:1/base"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "https://bucket.s3.amazonaws.com"),
        ({"AWS_ENDPOINT_URL": "https://s3.host", "AWS_PROFILE": "virtual"}, "https://bucket.s3.host"),
        ({"AWS_PROFILE": "path", "AWS_REGION": "us-west-2"}, "https://s3.us-west-2.amazonaws.com"),
        ({"AWS_PROFILE": "work"}, "http://configured:1"),
        ({"AWS_USE_FIPS_ENDPOINT": "true", "AWS_REGION": "us-west-2"}, "https://bucket.s3-fips.us-west-2.amazonaws.com"),
    ],
)  # fmt: skip
def test_endpoint_and_addressing(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], endpoint: str
) -> None:
    (tmp_path / "config").write_text(CONFIG.format(endpoint="http://configured:1"))
    for name, value in {"AWS_REGION": "us-east-1", **settings}.items():
        clean_environment.setenv(name, value)
    connection = connect("bucket")
    assert connection.endpoint == endpoint
    assert connection.guarded == endpoint.startswith("https")


@pytest.mark.s3
def test_a_profile_supplies_keys_and_endpoint(
    clean_environment: pytest.MonkeyPatch, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    clean_environment.delenv("AWS_ACCESS_KEY_ID")
    clean_environment.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(CONFIG.format(endpoint=s3_server.endpoint))
    (tmp_path / "credentials").write_text(CREDENTIALS.format(name="work", key=ACCESS_KEY, secret=SECRET_KEY))
    clean_environment.setenv("AWS_PROFILE", "work")
    store = open_store(f"s3://{s3_server.bucket}/profile")
    store.put("a", b"by profile")
    stored = s3_server.client().get_object(Bucket=s3_server.bucket, Key="profile/a")
    assert stored["Body"].read() == b"by profile"


@pytest.mark.parametrize("profile", ["virtual", "path"])
def test_requests_go_where_those_of_boto3_go(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path, profile: str
) -> None:
    import boto3
    from botocore.exceptions import ClientError

    (tmp_path / "config").write_text(CONFIG.format(endpoint="http://unused"))
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)  # a proxy is asked for the whole URL
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    clean_environment.setenv("AWS_PROFILE", profile)
    clean_environment.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.test")
    clean_environment.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    clean_environment.delenv("no_proxy", raising=False)
    clean_environment.delenv("NO_PROXY", raising=False)
    try:
        with pytest.raises(NotFound):
            open_store("s3://bucket/folder").read("alpha=0.5/a file.json")
        with pytest.raises(ClientError):
            boto3.Session().client("s3").get_object(Bucket="bucket", Key="folder/alpha=0.5/a file.json")
    finally:
        server.shutdown()
        server.server_close()
    ours, theirs = asked
    host = "bucket.s3.example.test" if profile == "virtual" else "s3.example.test/bucket"
    assert unquote(ours) == unquote(theirs)
    assert ours.startswith(f"http://{host}/folder/")


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        ((400, "AuthorizationHeaderMalformed"), "set AWS_REGION"),
        ((301, "PermanentRedirect"), "set AWS_REGION"),
        ((403, "AccessDenied"), r"s3:GetObject"),
        ((403, "RequestTimeTooSkewed"), "clock"),
        ((400, "ExpiredToken"), r"AWS_PROFILE"),
        ((501, "NotImplemented"), r"501 NotImplemented"),
    ],
)
def test_what_a_store_refuses_is_said_with_its_remedy(
    clean_environment: pytest.MonkeyPatch, answer: tuple[int, str], remedy: str
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{answer[1]}</Code><Message>no</Message></Error>".encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    clean_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(StorageError, match=rf"s3://bucket/x/a.*{remedy}"):
            open_store("s3://bucket/x").read("a")
        with pytest.raises(StorageError, match=rf"s3://bucket/x.*{remedy}"):
            open_store("s3://bucket/x").list()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"AWS_PROFILE": "nobody"}, "nobody"),
        ({"AWS_CA_BUNDLE": "/no/such/file"}, "/no/such/file"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "not a url"),
    ],
)
def test_settings_that_cannot_work_are_named(
    clean_environment: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    for name, value in settings.items():
        clean_environment.setenv(name, value)
    with pytest.raises(StorageError, match=rf"s3://bucket: .*{said}.*AWS settings"):
        open_store("s3://bucket/x")


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key, in one PEM file."""
    x509: Any = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "expo-ray test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        made.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def tls_proxy(
    aws_environment: dict[str, str], s3_server: SeaweedFS, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FaultProxy(s3_server.endpoint, tls=context) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 5)
        forget_stores()
        yield proxy


@pytest.mark.s3
def test_tls_with_a_private_authority_needs_no_second_read(
    tls_proxy: FaultProxy, s3_uri: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("AWS_ENDPOINT_URL", tls_proxy.endpoint)
    forget_stores()
    store = open_store(s3_uri)
    etag = store.put("a", b"0123456789").etag
    tls_proxy.inject()
    out = bytearray(4)
    store.read_into("a", 3, memoryview(out), etag=etag)
    assert out == b"3456"
    assert [method for method, _ in tls_proxy.requests] == ["GET"]


@pytest.mark.s3
def test_without_tls_every_range_is_read_twice(
    s3_server: SeaweedFS, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_stores()
        store = open_store(s3_uri)
        etag = store.put("a", b"0123456789").etag
        proxy.inject()
        store.read_into("a", 3, memoryview(bytearray(4)), etag=etag)
        assert [method for method, _ in proxy.requests] == ["GET", "GET"]


@pytest.mark.s3
def test_an_untrusted_certificate_names_the_remedy(
    tls_proxy: FaultProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", tls_proxy.endpoint)
    forget_stores()
    with pytest.raises(StorageError, match=r"not trusted; set AWS_CA_BUNDLE"):
        open_store(s3_uri).stat("a")
