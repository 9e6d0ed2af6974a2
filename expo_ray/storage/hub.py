"""Model repositories of the Hugging Face Hub, read-only, pinned to one commit."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from expo_ray.config.fields import READ_ONLY
from expo_ray.errors import InputChanged, NotFound, StorageError, TransientStorageError
from expo_ray.storage.checksums import Checksum
from expo_ray.storage.hub_errors import translate
from expo_ray.storage.local import fill
from expo_ray.storage.pace import pace_of
from expo_ray.storage.protocol import BUFFER_BYTES, MOST_BYTES, FileInfo, Writer, check_size
from expo_ray.storage.retry import copy_pieces, equal_pieces, read_agreed, reads_twice, retry_translated
from expo_ray.storage.uri import check_key, check_listing
from expo_ray.text import remember_secret, shown
from expo_ray.untrusted import Foreign, validated

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_S = 10.0  # without a byte
LOOKUP_TIMEOUT_S = 30.0  # the Hub takes its time over repositories of many files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PARTIAL_CONTENT = 206
_EXPIRED = {401, 403, 404, 410}  # what signed addresses answer after a while

T = TypeVar("T")


class _Lfs(Foreign):
    sha256: str


class _Listed(Foreign):
    """A file in a listing of the Hub."""

    name: str
    size: Annotated[int, Field(ge=0, lt=2**63)] | None
    blob_id: str | None
    lfs: _Lfs | None


class HubStore:
    """A model repository, or a folder of one, at one commit.

    Token, `HF_ENDPOINT`, proxies and the cache are huggingface_hub's. A file that the cache holds at this commit is read from
    disk; ranges of others are fetched without downloading the whole.

    Args:
        uri: `hf://org/name`, `hf://org/name@revision` or `hf://org/name@revision/folder`; a revision with a slash is written
            with `%2F`, or as `refs/pr/<n>`.
        planned: files of the commit that `uri` names, if they are known; the Hub is then not asked for them.

    Attributes:
        uri: with the commit as revision, so that opening it again reads the same files.
        revision: the commit, 40 hex digits.
    """

    local_path: Path | None = None
    chunk_bytes = 8 << 20  # a request to the Hub takes longer than one within a data centre
    concurrency = 8

    def __init__(self, uri: str, planned: Mapping[str, FileInfo] | None = None) -> None:
        try:
            from huggingface_hub import HfApi, parse_hf_uri
            from huggingface_hub.errors import HfUriError
        except ImportError as error:
            raise StorageError(
                f"{uri}: {error.name} is not installed; pip install 'expo-ray[hub]'"
            ) from error
        try:
            parsed = parse_hf_uri(uri)
        except HfUriError as error:
            raise StorageError(
                f"{uri}: not a model on the Hub; write hf://org/name or hf://org/name@revision"
            ) from error
        if parsed.type != "model":
            raise StorageError(
                f"{uri}: a {parsed.type}, not a model; write hf://org/name or hf://org/name@revision"
            )
        self._repo = parsed.id
        self._folder = f"{parsed.path_in_repo.strip('/')}/" if parsed.path_in_repo.strip("/") else ""
        self._api: HfApi = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        remember_token()
        named = f"hf://{self._repo}" + (f"@{parsed.revision}" if parsed.revision else "")
        if planned is None or not _COMMIT.fullmatch(parsed.revision or ""):
            self.revision, self._files = self._ask(lambda: self._look(named, parsed.revision), named)
        else:
            self.revision, self._files = parsed.revision or "", dict(planned)
        self.uri = f"hf://{self._repo}@{self.revision}/{self._folder}".rstrip("/")
        self._locations: dict[str, str] = {}

    def __reduce__(self) -> tuple[type[HubStore], tuple[str]]:
        return HubStore, (self.uri,)

    def list(self, prefix: str = "") -> list[FileInfo]:
        return [info for key, info in self._files.items() if key.startswith(prefix)]

    def stat(self, key: str) -> FileInfo:
        try:
            return self._files[check_key(key, self.uri)]
        except KeyError:
            raise NotFound(f"{self.uri}/{key}: no such file in the repository") from None

    def read(self, key: str, *, most_bytes: int = MOST_BYTES) -> bytes:
        info = self.stat(key)
        uri = f"{self.uri}/{key}"
        check_size(uri, info.size, most_bytes)
        for again in (False, True):  # the first copy may have been damaged on its way, or in the cache
            data = Path(self._ask(partial(self._download, key, force=again), uri)).read_bytes()
            if _digest(data, info.etag) == info.etag:
                return data
        raise TransientStorageError(
            f"{uri}: the bytes that arrive do not have the digest {info.etag} that the Hub lists"
        )

    def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
        info = self.stat(key)
        uri = f"{self.uri}/{key}"
        view = out.cast("B")
        if info.etag != etag:
            raise InputChanged(f"{uri} is not the file that was planned; plan again")
        if start + len(view) > info.size:
            raise StorageError(f"{uri} ends at byte {info.size}, before byte {start + len(view)}")
        if not view or self._read_cached(info, start, view):
            return

        def copy() -> None:
            self._ask(lambda: copy_pieces(self._range(key, start, len(view)), view, uri), uri)

        def agrees(_: None) -> bool:
            return self._ask(lambda: equal_pieces(self._range(key, start, len(view)), view), uri)

        if self.guarded or (once and not reads_twice()):
            copy()
        else:
            read_agreed(copy, agrees, uri)

    def checksum(self, info: FileInfo) -> Checksum | None:
        return None  # SHA-256, which ranges do not combine into

    def put(self, key: str, data: bytes) -> FileInfo:
        self._refuse()

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        self._refuse()

    def writer(self, key: str, size: int, *, buffer_bytes: int = BUFFER_BYTES) -> Writer:
        self._refuse()

    def delete(self, key: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StorageError(f"{self.uri}: {READ_ONLY}")

    @property
    def guarded(self) -> bool:
        return self._api.endpoint.startswith("https://")

    def _look(self, named: str, revision: str | None) -> tuple[str, dict[str, FileInfo]]:
        """Ask for the commit and its files, sorted by key; one request, which unlike a listing of the tree can be given a timeout."""
        model = self._api.model_info(
            self._repo, revision=revision, files_metadata=True, timeout=LOOKUP_TIMEOUT_S
        )
        if not isinstance(model.sha, str) or not model.sha.isalnum():
            raise StorageError(f"{named}: the Hub names no commit; is HF_ENDPOINT a Hub?")
        start = len(self._folder)
        # huggingface_hub passes on what the Hub says, whatever its type.
        files = [
            validated(
                _Listed,
                {
                    "name": file.rfilename,
                    "size": file.size,
                    "blob_id": file.blob_id,
                    "lfs": file.lfs and vars(file.lfs),
                },
                f"{named}: the listing of {self._api.endpoint}",
                error=StorageError,
                remedy="correct HF_ENDPOINT",
            )
            for file in model.siblings or []
        ]
        check_listing((file.name for file in files), named)
        return model.sha, {
            file.name[start:]: FileInfo(
                file.name[start:], file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or ""
            )
            for file in sorted(files, key=lambda file: file.name)
            if file.name.startswith(self._folder)
        }

    def _download(self, key: str, *, force: bool) -> str:
        return self._api.hf_hub_download(
            self._repo, self._folder + key, revision=self.revision, force_download=force
        )

    def _read_cached(self, info: FileInfo, start: int, view: memoryview) -> bool:
        """Fill `view` from huggingface_hub's cache, if it holds the whole file at this commit."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self._repo, self._folder + info.key, revision=self.revision)
        if not isinstance(cached, str):
            return False
        fd = os.open(cached, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fstat(fd).st_size == info.size and fill(fd, start, view) == len(view)
        finally:
            os.close(fd)

    def _range(self, key: str, start: int, size: int) -> Iterator[bytes]:
        """Fetch bytes of a file, in pieces, from the address to which the Hub last redirected.

        So a file costs one look-up and not one per range: the Hub allows a few thousand per five minutes, and a model of 70 B
        parameters has ten times as many ranges.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        home = hf_hub_url(self._repo, self._folder + key, revision=self.revision, endpoint=self._api.endpoint)
        location = self._locations.get(key)
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        if location is None:  # the token is for the Hub, not for where it redirects to
            headers |= build_hf_headers()
        with get_session().stream(
            "GET", location or home, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
        ) as answer:
            if location is not None and answer.status_code in _EXPIRED:
                self._locations.pop(key, None)
                raise TransientStorageError(f"{self.uri}/{key}: the address to download from has expired")
            hf_raise_for_status(answer)
            if answer.status_code != _PARTIAL_CONTENT:
                raise StorageError(
                    f"{self.uri}/{key}: answered {answer.status_code} to a request for a range; is HF_ENDPOINT a Hub?"
                )
            self._check_version(key, start, size, answer)
            if answer.url.host != urlsplit(home).hostname:
                self._locations[key] = str(answer.url)
            yield from answer.iter_raw()

    def _check_version(self, key: str, start: int, size: int, answer: Any) -> None:
        """Refuse the answer of a mirror that serves another commit or another file.

        Raises:
            InputChanged: if its headers name other bytes than those that were asked for.
        """
        whole = self._files[key].size
        ranges = {f"bytes {start}-{start + size - 1}/{length}" for length in (whole, "*")}
        answered = answer.headers.get("Content-Range", "")
        if answered not in ranges:
            raise InputChanged(
                f"{self.uri}/{key}: bytes {start} to {start + size - 1} of {whole} were asked for, and the answer is "
                f"{shown(answered)!r}; plan again, and see whether HF_ENDPOINT names a Hub"
            )
        first = (*answer.history, answer)[0]
        commit = first.headers.get("X-Repo-Commit", self.revision)
        if commit != self.revision:
            raise InputChanged(
                f"{self.uri}/{key}: the answer is of the commit {shown(commit)}; see whether HF_ENDPOINT names a Hub"
            )

    def _ask(self, ask: Callable[[], T], uri: str) -> T:
        endpoint = self._api.endpoint
        return retry_translated(ask, lambda error: translate(error, uri, endpoint), pace_of(endpoint))


def remember_token() -> None:
    """Keep the token of huggingface_hub, which may come from a file, out of all output.

    Raises:
        StorageError: if no request can carry it.
    """
    from huggingface_hub import get_token

    token = get_token() or ""
    remember_secret(token)
    if not (token.isascii() and token.isprintable()):
        raise StorageError(
            "the token of the Hub has characters that no request can carry; set HF_TOKEN, or log in with `hf auth login` again"
        )


def _digest(data: bytes, like: str) -> str:
    """The digest that the Hub lists: SHA-256 of a file in LFS or Xet, Git's blob id of any other."""
    if len(like) == hashlib.sha256().digest_size * 2:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
