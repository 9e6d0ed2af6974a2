"""Clients for a bucket, made from the AWS settings that every tool takes.

botocore decides credentials, region, endpoint and addressing style, uploads parts and reads headers that obstore does not pass on;
obstore does everything else, at a third of the CPU time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from expo_ray.errors import StorageError
from expo_ray.storage.connection import (
    NO_RETRIES,
    Cloud,
    Connection,
    reading_options,
    timeouts_of_writes,
    writing_options,
)
from expo_ray.storage.pace import pace_of
from expo_ray.text import remember_file_secrets, remember_secret, shown_end

if TYPE_CHECKING:
    import boto3
    from botocore.awsrequest import AWSPreparedRequest
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from obstore.store import ClientConfig, S3Credential
    from obstore.store import S3Store as Client

# Connections that the threads of a process may need for uploads at once; more wait for each other.
_MOST_CONNECTIONS = 64
# Below the 10 minutes that botocore keeps in hand before credentials expire.
CREDENTIAL_TTL = timedelta(minutes=5)

# Nobody can listen there. obstore follows redirects, and the AWS session token goes along to whatever host they name; so every
# host but the endpoint's is reached through this "proxy", that is, not at all.
NOWHERE = "127.0.0.1:0"

S3 = Cloud(
    credentials="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where an instance or pod role grants access",
    rights="grant them s3:ListBucket, s3:GetObject, and for outputs s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload",
    endpoint="AWS_ENDPOINT_URL",
    certificates="set AWS_CA_BUNDLE to the file of its authority",
    region="AWS_REGION",
)


@dataclass(frozen=True)
class S3Connection(Connection):
    """Clients of one bucket of S3.

    Attributes:
        headers: botocore's client, for uploads in parts and for headers of answers; retries nothing.
    """

    headers: Any


@cache
def connect(bucket: str) -> S3Connection:
    """Make the connection of this process to `bucket`; no request is sent to it yet.

    Raises:
        StorageError: without usable credentials or settings.
    """
    try:
        import boto3
        import obstore  # noqa: F401
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise StorageError(
            f"s3://{bucket}: {error.name} is not installed; pip install 'expo-ray[s3]'"
        ) from error
    try:
        # Every AWS SDK but Python's reads AWS_REGION, and Kubernetes sets it.
        session = boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
        credentials = session.get_credentials()
        if credentials is None or not CredentialProvider(credentials)()["access_key_id"]:
            raise StorageError(f"s3://{bucket}: no AWS credentials found; {S3.credentials}")
        session._session._credentials = _Stripped(credentials)  # type: ignore[attr-defined]
        client = _headers_client(session)
        return _connection(session, credentials, bucket, _address(client, bucket), client)
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        _remember_files()
        raise StorageError(
            f"s3://{bucket}: {shown_end(error, 500)}; correct the AWS settings (environment, ~/.aws)"
        ) from error


class CredentialProvider:
    """Credentials of botocore as obstore takes them; whatever they are, they are kept out of all output."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def __call__(self) -> S3Credential:
        """Fetch credentials that are valid now.

        Raises:
            StorageError: if no request can carry them.
        """
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": _usable(frozen.access_key, "AWS_ACCESS_KEY_ID"),
            "secret_access_key": _usable(frozen.secret_key, "AWS_SECRET_ACCESS_KEY"),
            "token": _usable(frozen.token, "AWS_SESSION_TOKEN") or None,
            "expires_at": datetime.now(UTC) + CREDENTIAL_TTL,
        }


class _Stripped:
    """Credentials of botocore without line breaks around them, for botocore's own client."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        frozen = self._credentials.get_frozen_credentials()
        keys = (
            _usable(frozen.access_key, "AWS_ACCESS_KEY_ID"),
            _usable(frozen.secret_key, "AWS_SECRET_ACCESS_KEY"),
        )
        return frozen._replace(
            access_key=keys[0], secret_key=keys[1], token=_usable(frozen.token, "AWS_SESSION_TOKEN") or None
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._credentials, name)


def _usable(secret: str | None, variable: str) -> str:
    """`secret` without the line break that mounted files end with."""
    stripped = (secret or "").strip()
    remember_secret(stripped)
    if not (stripped.isascii() and stripped.isprintable()):
        raise StorageError(
            f"the AWS credentials, of which one is {variable} or stands for it in ~/.aws, hold a character that no request can "
            f"carry; set {variable} again"
        )
    return stripped


def _remember_files() -> None:
    """Keep what stands in the files of AWS settings out of all output: botocore quotes a file that it cannot parse."""
    for variable, default in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
    ):
        path = os.path.expanduser(os.environ.get(variable) or default)
        try:
            if os.path.isfile(path):
                remember_file_secrets(Path(path).read_text(errors="replace"))
        except OSError:
            continue


@dataclass(frozen=True)
class Address:
    """Address of a bucket as botocore would use it: `endpoint` has the bucket in its host if `virtual_hosted`."""

    endpoint: str
    virtual_hosted: bool
    region: str


def _headers_client(session: boto3.Session) -> Any:
    from botocore.config import Config

    connect_timeout_s, write_timeout_s = timeouts_of_writes()
    return session.client(
        "s3",
        config=Config(
            connect_timeout=connect_timeout_s,
            read_timeout=write_timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=_MOST_CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _address(client: Any, bucket: str) -> Address:
    """Let botocore build a HEAD request, intercept it before it is sent, and read endpoint and addressing style from its URL.

    So every AWS setting is honoured: variables, profiles, `endpoint_url` of a service, `addressing_style`, dual-stack and FIPS
    endpoints. botocore has no public function for the result of these. A presigned URL would not do: botocore signs it for the
    global endpoint, whatever the region.
    """
    key = "expo-ray"
    # A handler of `before-send` may answer in place of the network; this one raises, so that nothing is sent.
    client.meta.events.register("before-send.s3", _intercept)
    try:
        client.head_object(Bucket=bucket, Key=key)
        raise AssertionError("botocore sent a request without announcing it")
    except _Intercepted as request:
        url = urlsplit(request.url)
    finally:
        client.meta.events.unregister("before-send.s3", _intercept)
    path_style = url.path.endswith(f"/{bucket}/{key}")
    base = url.path.removesuffix(f"/{bucket}/{key}" if path_style else f"/{key}")
    if url.query or url.fragment:
        raise StorageError(
            f"s3://{bucket}: the endpoint {url.scheme}://{url.hostname} is set with a query; leave it out of AWS_ENDPOINT_URL"
        )
    region = client.meta.region_name
    return Address(
        # S3 knows no user and password of an endpoint; requests are signed.
        endpoint=f"{url.scheme}://{url.netloc.rpartition('@')[2]}{base}",
        virtual_hosted=not path_style,
        region="us-east-1" if region == "aws-global" else region,
    )


class _Intercepted(Exception):
    """Carries the URL of a request that was ready to be sent."""

    def __init__(self, url: str) -> None:
        self.url = url


def _intercept(request: AWSPreparedRequest, **_: object) -> NoReturn:
    raise _Intercepted(request.url)


def _connection(
    session: boto3.Session, credentials: Credentials, bucket: str, address: Address, client: Any
) -> S3Connection:
    guarded = address.endpoint.startswith("https://")
    options: ClientConfig = _no_redirects(address.endpoint)
    if ca_bundle := session._session.get_config_variable("ca_bundle"):
        options["root_certificate"] = Path(ca_bundle).read_text()
    reading: ClientConfig = {**reading_options(allow_http=not guarded), **options}
    writing: ClientConfig = {**writing_options(allow_http=not guarded), **options}
    puts = _client(credentials, bucket, address, writing)
    return S3Connection(
        cloud=S3,
        bucket=bucket,
        endpoint=address.endpoint,
        guarded=guarded,
        reads=_client(credentials, bucket, address, reading),
        puts=puts,
        uploads=puts,  # botocore sends parts, as obstore does not combine their checksums
        pace=pace_of(f"{address.endpoint}/{bucket}"),
        headers=client,
    )


def _no_redirects(endpoint: str) -> ClientConfig:
    """Options that keep redirects from leading to another host; none where requests go through a real proxy."""
    url = urlsplit(endpoint)
    proxies = getproxies_environment()
    host = url.hostname or ""
    if (proxies.get(url.scheme) or proxies.get("all")) and not proxy_bypass(host):
        return {}
    return {"proxy_url": f"http://{NOWHERE}", "proxy_excludes": host}


def _client(credentials: Credentials, bucket: str, address: Address, options: ClientConfig) -> Client:
    from obstore.store import S3Store as Client

    return Client(
        bucket,
        region=address.region,
        # Not `endpoint`: the variable AWS_ENDPOINT_URL_S3, which obstore reads too, would win over it.
        aws_endpoint_url_s3=address.endpoint,
        virtual_hosted_style_request=address.virtual_hosted,
        checksum_algorithm="SHA256",
        conditional_put="etag",
        disable_bulk_delete=True,  # not every S3-compatible store knows DeleteObjects
        skip_signature=False,
        client_options=options,
        retry_config=NO_RETRIES,
        credential_provider=CredentialProvider(credentials),
    )
