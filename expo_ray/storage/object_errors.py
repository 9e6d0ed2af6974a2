"""Errors of obstore in our words, each with its remedy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from expo_ray.errors import NotFound, SlowDown, StorageError, TransientStorageError
from expo_ray.storage.connection import Connection
from expo_ray.storage.s3_connection import NOWHERE
from expo_ray.text import shown

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Answers of a store that is asked too much.
_SLOW_DOWN_STATUS = {429, 503}
_SLOW_DOWN_CODES = {
    "SlowDown",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "ServerBusy",
    "TooManyRequests",
}
# Answers after which the same request, or the same upload from its start, may succeed: overload, an upload that is gone, and damage
# on the way (our requests to complete an upload are well-formed and name the right parts when they leave).
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "InvalidDigest",
    "InvalidPart",
    "InvalidPartOrder",
    "MalformedXML",
    "NoSuchUpload",
    "RequestTimeout",
    "ServiceUnavailable",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    *_SLOW_DOWN_CODES,
}
_REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_CREDENTIAL_CODES = {
    "AuthenticationFailed",
    "AuthenticationRequired",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_NO_BUCKET_CODES = {"ContainerNotFound", "NoSuchBucket"}

_REDIRECTS = {301, 302, 303, 307, 308}

_STATUS = re.compile(r"(?:status code|\(code): (\d{3})")  # the second of a request in a batch
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{0,10000})")
_CAUSE = re.compile(
    r'(?:message|error): "([^"]+)"|kind: (Timeout|Interrupted|Connect)\b|source: (TimedOut|IncompleteMessage)'
)


def status_of(error: Exception) -> int:
    """HTTP status that obstore wrote into its message; 0 if there was no answer."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else 0


def translate(error: Exception, uri: str, connection: Connection) -> StorageError:
    """The error to raise in place of `error`, met while working on `uri`.

    Raises:
        KeyboardInterrupt: if a signal caused the error. The only Python code that obstore runs is our credential provider, so a
            signal may arrive there; obstore reports its KeyboardInterrupt as a failure of the provider.
    """
    if "credential provider: KeyboardInterrupt" in str(error):
        raise KeyboardInterrupt from error
    if status := status_of(error):
        text = str(error)
        code = match[1] if (match := _CODE.search(text)) else ""
        message = match[1] if (match := _MESSAGE.search(text)) else ""
        return _answered(status, code, message, uri, connection)
    return _unanswered(error, uri, connection)


def translate_botocore(error: Exception, uri: str, connection: Connection) -> StorageError:
    """As `translate`, for an error of botocore."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, SSLError

    if isinstance(error, ClientError):
        answer = error.response.get("Error", {})
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
        raised = _answered(status, "" if code == str(status) else code, message, uri, connection)
        if isinstance(raised, SlowDown):
            raised.retry_after_s = retry_after_s(error)
        return raised
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return _untrusted(uri, connection)
    if isinstance(error, ConnectionError | HTTPClientError | OSError):
        return TransientStorageError(
            f"{uri}: no complete answer from {connection.endpoint} ({type(error).__name__})"
        )
    return StorageError(f"{uri}: {shown(error, 500)}; {connection.cloud.credentials}")


def code_of(error: Exception) -> str:
    """Code of an answer to botocore; empty if there was none."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def retry_after_s(error: ClientError) -> float:
    """Seconds after which the store wants to be asked again; 0 if it does not say, or names a date."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


def _answered(status: int, code: str, message: str, uri: str, connection: Connection) -> StorageError:
    said = shown(" ".join(filter(None, [str(status), code, message])), 500)
    bucket = f"bucket {connection.bucket!r} at {connection.endpoint}"
    if status in TRANSIENT_STATUS or code in TRANSIENT_CODES:
        slow_down = status in _SLOW_DOWN_STATUS or code in _SLOW_DOWN_CODES
        kind = SlowDown if slow_down else TransientStorageError
        error = kind(f"{uri}: the store answered {said}")
        error.passes_with_time = slow_down or status in TRANSIENT_STATUS
        return error
    if code in _REGION_CODES or status in _REDIRECTS:
        return _elsewhere(uri, connection, bucket, said)
    if code in _NO_BUCKET_CODES:
        return NotFound(
            f"{uri}: there is no {bucket}; create it, or correct the URI or {connection.cloud.endpoint}"
        )
    if status == 404:
        return NotFound(f"{uri}: no such object in {bucket}")
    if status in {401, 403} or code in _CREDENTIAL_CODES:
        return _denied(uri, connection, bucket, code, said)
    return StorageError(f"{uri}: the store answered {said}")


def _elsewhere(uri: str, connection: Connection, bucket: str, said: str = "") -> StorageError:
    cloud = connection.cloud
    if cloud.region and said and not any(said.startswith(str(status)) for status in _REDIRECTS):
        return StorageError(f"{uri}: {bucket} is in another region; set {cloud.region} to it ({said})")
    region = f"{cloud.region} to the region of the bucket, or " if cloud.region else ""
    return StorageError(
        f"{uri}: {connection.endpoint} redirects to another host, which would get the session token and is not asked; set "
        f"{region}{cloud.endpoint} to the store itself"
    )


def _denied(uri: str, connection: Connection, bucket: str, code: str, said: str) -> StorageError:
    if code in _CREDENTIAL_CODES:
        return StorageError(
            f"{uri}: {bucket} refused the credentials ({said}); {connection.cloud.credentials}"
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{uri}: {bucket} refused the request ({said}); set this machine's clock")
    return StorageError(
        f"{uri}: permission denied by {bucket} ({said}); check the credentials, and {connection.cloud.rights}"
    )


def _unanswered(error: Exception, uri: str, connection: Connection) -> StorageError:
    text = str(error)
    if "redirect without LOCATION" in text:
        region = connection.cloud.region or connection.cloud.endpoint
        return StorageError(f"{uri}: bucket {connection.bucket!r} is in another region; set {region} to it")
    if NOWHERE in text and "tcp connect error" in text:
        return _elsewhere(uri, connection, connection.bucket)
    if "InvalidCertificate" in text:
        return _untrusted(uri, connection)
    if "HTTP error" in text or isinstance(error, TimeoutError):
        causes = ["".join(groups) for groups in _CAUSE.findall(text)]
        cause = causes[-1] if causes else "the connection broke"
        return TransientStorageError(f"{uri}: no complete answer from {connection.endpoint} ({cause})")
    said = shown(" ".join(text.partition("Debug source")[0].split()), 500)
    if type(error).__name__ == "UnauthenticatedError":
        return StorageError(f"{uri}: {said}; {connection.cloud.credentials}")
    return StorageError(f"{uri}: {said}")


def _untrusted(uri: str, connection: Connection) -> StorageError:
    return StorageError(
        f"{uri}: the TLS certificate of {connection.endpoint} is not trusted; {connection.cloud.certificates}"
    )
