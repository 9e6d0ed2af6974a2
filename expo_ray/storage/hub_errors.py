"""Errors of huggingface_hub in our words, each with its remedy."""

from __future__ import annotations

from typing import Any

from expo_ray.errors import NotFound, SlowDown, StorageError, TransientStorageError
from expo_ray.text import shown

_SLOW_DOWN_STATUS = {429, 503}
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}

# By class name, the most derived first: the classes themselves sit in libraries that take a second to import.
_MEANING: dict[str, tuple[type[StorageError], str]] = {
    "OfflineModeIsEnabled": (
        StorageError,
        "HF_HUB_OFFLINE is set; unset it, or give a local folder that holds the model",
    ),
    "GatedRepoError": (
        StorageError,
        "the model is gated; accept its terms at {endpoint}/{repo}, and set HF_TOKEN to a token of that account",
    ),
    "RevisionNotFoundError": (
        NotFound,
        "no such revision; give a branch, a tag or a commit listed at {endpoint}/{repo}/commits",
    ),
    "RepositoryNotFoundError": (
        NotFound,
        "no such model at {endpoint}, or a private one; check the name, and set HF_TOKEN to a token that may read it",
    ),
    "RemoteEntryNotFoundError": (NotFound, "no such file in the repository"),
    "LocalEntryNotFoundError": (TransientStorageError, "no complete answer from {endpoint} ({error})"),
    "TransportError": (TransientStorageError, "no complete answer from {endpoint} ({error})"),
    "OSError": (
        StorageError,
        "{error}; if it is the cache, set HF_HOME to a writable folder with free space",
    ),
}


def translate(error: Exception, uri: str, endpoint: str) -> StorageError:
    """The error to raise in place of `error`, met while working on `uri`."""
    for kind in type(error).__mro__:
        if kind.__name__ in _MEANING:
            raised, text = _MEANING[kind.__name__]
            repo = uri.removeprefix("hf://").partition("@")[0]
            cause = shown(error) or type(error).__name__
            return raised(f"{uri}: " + text.format(endpoint=endpoint, repo=repo, error=cause))
        if kind.__name__ == "HfHubHTTPError":
            return _answered(error.response, uri, endpoint)  # type: ignore[attr-defined]
    if isinstance(
        error, LookupError | TypeError | AttributeError | ValueError | ArithmeticError | RecursionError
    ):
        # huggingface_hub does not check the fields of an answer.
        fault = f"{type(error).__name__} {shown(error)}"
        return StorageError(f"{uri}: {endpoint} does not answer like a Hub ({fault}); correct HF_ENDPOINT")
    return StorageError(f"{uri}: {shown(error)}")


def _answered(response: Any, uri: str, endpoint: str) -> StorageError:
    status = response.status_code
    if status in _SLOW_DOWN_STATUS:
        error = SlowDown(f"{uri}: {endpoint} answered {status}")
        error.retry_after_s = _retry_after_s(response)
        return error
    if status in TRANSIENT_STATUS:
        return TransientStorageError(f"{uri}: {endpoint} answered {status}")
    if status in {401, 403}:
        return StorageError(f"{uri}: {endpoint} answered {status}; set HF_TOKEN to a token that may read it")
    return StorageError(f"{uri}: {endpoint} answered {status}")


def _retry_after_s(response: Any) -> float:
    """Seconds until the Hub wants to be asked again, by `Retry-After` or by the header of its rate limits; 0 if it does not say."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit else 0.0
