"""Writing into a model repository of the Hugging Face Hub: files first, then one commit that shows them all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from expo_ray.errors import InputChanged, NotFound, StorageError
from expo_ray.storage.hub import HubStore, remember_token
from expo_ray.storage.hub_errors import translate
from expo_ray.storage.retry import retry_translated
from expo_ray.text import shown

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

_FORBIDDEN, _OVERTAKEN = {401, 403}, {409, 412}

T = TypeVar("T")


def check_token() -> str:
    """Ask the Hub for the account whose token is set, and return its name; the Hub limits this request, so once per command.

    Raises:
        StorageError: if there is no token, or one that cannot write.
    """
    from huggingface_hub import get_token

    api = _api()
    remedy = "set HF_TOKEN to a token that may write, or log in with `hf auth login`"
    if get_token() is None:
        raise StorageError(f"no token for {api.endpoint}; {remedy}")
    user: dict[str, Any] = _ask(api.whoami, f"token for {api.endpoint}", api.endpoint, remedy)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise StorageError(
            f"the token of {shown(user.get('name'))} for {api.endpoint} may only read; {remedy}"
        )
    return str(user.get("name"))


class HubRepository:
    """The main branch of a model repository, which may not be there yet.

    Token, `HF_ENDPOINT` and transfer (Xet or LFS) are huggingface_hub's. Methods raise `StorageError`, or
    `TransientStorageError` after their own retries.

    Args:
        repo_id: `org/name`.
    """

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self._api = _api()
        self.uri, self.url = f"hf://{repo_id}", f"{self._api.endpoint}/{repo_id}"

    def look(self) -> HubStore | None:
        """Look at the repository as it is now; None if it is not there, or hidden from this token."""
        try:
            return HubStore(self.uri)
        except NotFound:
            return None

    def create(self, *, private: bool) -> HubStore:
        """Create the repository; one that is there by now keeps its visibility."""
        # Without `private`, the organisation's own default holds.
        self._do(lambda: self._api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        return HubStore(self.uri)

    def upload(self, key: str, path: str, sha256: str) -> CommitOperationAdd:
        """Send a big file, which is invisible until `commit`; afterwards the file at `path` may be deleted.

        Raises:
            InputChanged: if the bytes sent are not those of `sha256`.
        """
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(path_in_repo=key, path_or_fileobj=path)
        self._do(lambda: self._api.preupload_lfs_files(self.repo_id, additions=[addition]))
        if isinstance(
            addition.path_or_fileobj, str
        ):  # still a path: so small that the Hub takes it within the commit
            with open(path, "rb") as file:
                addition.path_or_fileobj = file.read()
        if addition.upload_info.sha256.hex() != sha256:
            raise InputChanged(
                f"{key}: what was sent has sha256 {addition.upload_info.sha256.hex()}, the manifest says {sha256}; nothing was "
                "committed; look with `expo-ray verify`"
            )
        return addition

    def commit(
        self,
        uploaded: Sequence[CommitOperationAdd],
        small: dict[str, bytes],
        deleted: Sequence[str],
        *,
        parent: str,
        message: str,
    ) -> HubStore:
        """Make everything visible at once, on top of the commit `parent`, and return the repository as it then is.

        Raises:
            InputChanged: if there is a newer commit than `parent`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *uploaded,
            *(CommitOperationAdd(path_in_repo=key, path_or_fileobj=data) for key, data in small.items()),
            *(CommitOperationDelete(path_in_repo=key, is_folder=False) for key in deleted),
        ]
        # Asked twice it commits once: the second time, `parent` is not the newest any more.
        done = self._do(
            lambda: self._api.create_commit(
                self.repo_id, operations, commit_message=message, parent_commit=parent
            )
        )
        return HubStore(f"hf://{self.repo_id}@{done.oid}")

    def _do(self, ask: Callable[[], T]) -> T:
        owner = self.repo_id.partition("/")[0]
        remedy = f"set HF_TOKEN to a token that may write to {owner}, or log in with `hf auth login`"
        return _ask(ask, self.uri, self._api.endpoint, remedy)


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise StorageError(f"{error.name} is not installed; pip install 'expo-ray[hub]'") from error
    remember_token()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _ask(ask: Callable[[], T], what: str, endpoint: str, remedy: str) -> T:
    return retry_translated(ask, lambda error: _translated(error, what, endpoint, remedy))


def _translated(error: Exception, what: str, endpoint: str, remedy: str) -> StorageError:
    """The error to raise in place of `error`: as for reading, but for the answers that only a writer gets."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # huggingface_hub wraps what happens to an LFS upload
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _FORBIDDEN:
        return StorageError(f"{what}: {endpoint} answered {status}; {remedy}")
    if status in _OVERTAKEN:
        return InputChanged(f"{what} has got another commit in the meantime; push again")
    return translate(error, what, endpoint)
