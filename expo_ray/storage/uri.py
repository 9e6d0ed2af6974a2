"""Names of stores and of the objects in them: URIs, local paths and keys."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal, cast, get_args
from unicodedata import category
from urllib.parse import unquote

from expo_ray.errors import StorageError
from expo_ray.storage.missing import hub_uri
from expo_ray.text import shown

# Each has its store in `open_store`, where the type checker asks for it.
Scheme = Literal["file", "s3", "gs", "az", "hf", "memory"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# `s3://bucket/folder?X-Amz-Signature=...`; a `?` without a value behind it may be a part of a name.
_QUERY = re.compile(r"[?#][^/]*=")
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING or "
    "HF_TOKEN instead"
)
_LONGEST_NAME, _LONGEST_PATH = 255, 2000
_NOT_IN_NAMES = {"Cc", "Zl", "Zp"}
# `s3:/b` and `s3//b` would be local folders of that name.
_SLIP = re.compile(rf"({'|'.join(SCHEMES)})(?::|;|//)", re.IGNORECASE)


def split_uri(uri: str) -> tuple[Scheme, str]:
    """Scheme and the rest; a bare path has the scheme `file`.

    Raises:
        StorageError: for a scheme that no store speaks, credentials inside the URI, or a character that no name can hold.
    """
    check_name(uri)
    match = _SCHEME.fullmatch(uri)
    if match is None:
        if not uri:
            raise StorageError(
                "an empty path names no folder; give a local path or a URI such as s3://bucket/folder"
            )
        if slip := _SLIP.match(uri):
            scheme, rest = slip[1].lower(), uri[slip.end() :].lstrip(":;/")
            raise StorageError(
                f"{shown(uri)}: is neither a URI nor a likely path; write {scheme}://{'/' * (scheme == 'file')}{shown(rest)}, or "
                f"./{shown(uri)} for a local folder of that name"
            )
        return "file", uri
    if match[1].lower() not in SCHEMES:
        if meant := hub_uri(uri):
            raise StorageError(f"{shown(uri)}: a page of the Hugging Face Hub; write {shown(meant)}")
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{uri}: unknown scheme {match[1].lower()}://; use a local path or one of {known}")
    scheme, rest = cast(Scheme, match[1].lower()), match[2]
    if scheme != "file":
        _check_no_secrets(uri, rest)
    return scheme, rest


def local_path(uri: str) -> Path | None:
    """The absolute path of a local folder or file; None for a URI of any other store.

    The only place that decides what is local.

    Raises:
        StorageError: for a URI that no store can have, a path that no system can have, or `~` of a user without a home.
    """
    scheme, path = split_uri(uri)
    if scheme != "file":
        return None
    if path != uri:
        path = check_name(unquote(path))
        if not path.startswith("/"):
            raise StorageError(f"{uri}: a file URI names an absolute path, file:///folder")
    return Path(check_utf8(os.path.abspath(expand_home(path))))


def check_name(path: str) -> str:
    """Return `path` itself.

    Raises:
        StorageError: if no system can have a file of that name.
    """
    try:
        encoded = os.fsencode(path)
    except ValueError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise StorageError(
            f"{shown(path)}: holds a character that no name of a file can hold (NUL, or half of a surrogate pair); correct it"
        )
    return path


def _check_no_secrets(uri: str, rest: str) -> None:
    """Refuse credentials inside a URI.

    Raises:
        StorageError: for a user before the host, or a query behind the path.
    """
    if "@" in rest.partition("/")[0]:
        raise StorageError(
            f"{uri}: credentials do not belong in a URI, it is written into logs and manifests; {_CREDENTIALS}"
        )
    if _QUERY.search(rest):
        raise StorageError(
            f"{uri}: a query does not belong in a URI, and a signed URL opens one file where a model has many; leave it out, and "
            f"{_CREDENTIALS}"
        )


def check_utf8(name: str) -> str:
    """`name` itself.

    Raises:
        StorageError: if it holds bytes that are not UTF-8, which manifests, reports and other machines could not name.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        remedy = (
            "a name that is not UTF-8; rename it, or make a link to it with another name (ln -s)"
            if encoding == "utf-8"
            else f"this locale's names are {encoding}; set PYTHONUTF8=1"
        )
        raise StorageError(f"{shown(name)}: {remedy}") from None
    return name


def expand_home(path: str) -> str:
    """`path` with `~` replaced by the home folder.

    Raises:
        StorageError: if this user has none.
    """
    expanded = os.path.expanduser(path)
    of_home = path == "~" or path.startswith("~/")
    if of_home and (expanded == path or os.environ.get("EXPO_RAY_MADE_UP_HOME")):  # see `prepare_home`
        raise StorageError(
            f"{shown(path)}: this user has no home folder (HOME is not set, and /etc/passwd does not know the user); set HOME, or "
            "write the whole path"
        )
    return expanded


def join_uri(root: str, *parts: str) -> str:
    """`root` and keys below it, with one `/` between any two.

    Example:
        >>> join_uri("s3://models/expo/", "pairs/zephyr", "config.json")
        's3://models/expo/pairs/zephyr/config.json'
    """
    inner = [part.strip("/") for part in parts]
    head = root.rstrip("/") or ("/" if root else "")
    return "/".join([head.rstrip("/"), *filter(None, inner)]) if any(inner) else head


def split_file(uri: str) -> tuple[str, str]:
    """Folder and name of a file, for `open_store` and the key in it.

    Example:
        >>> split_file("s3://models/expo/prompts.jsonl")
        ('s3://models/expo', 'prompts.jsonl')

    Raises:
        StorageError: if `uri` names a bucket or a folder, or holds a secret.
    """
    split_uri(uri)
    folder, slash, name = uri.rpartition("/")
    if not name or folder.endswith(":/"):
        raise StorageError(f"{uri}: names no file; give its whole path")
    return (folder or "/") if slash else ".", name


def split_bucket(rest: str) -> tuple[str, str]:
    """Bucket (or name) and folder of `bucket/folder`, without empty parts."""
    name, _, folder = rest.partition("/")
    return name, "/".join(filter(None, folder.split("/")))


def check_key(key: str, uri: str) -> str:
    """Return `key` itself, if it names a file below a folder on any system.

    Raises:
        StorageError: if it is not a plain relative path in visible characters; keys also come from listings and index files that
            anyone may have written.
    """
    if (
        not key
        or "\\" in key
        or any(part in {"", ".", ".."} for part in key.split("/"))
        or (not key.isprintable() and any(category(character) in _NOT_IN_NAMES for character in key))
    ):
        raise StorageError(f"{uri}: {shown(key)!r} is not the name of a file below this folder")
    return key


def check_listing(keys: Iterable[str], uri: str) -> None:
    """Refuse a listing that cannot be laid out as files below one folder.

    Raises:
        StorageError: if a key is no plain relative path, has no encoding, or is a folder of another key.
    """
    names = set(keys)
    for key in names:
        check_key(key, uri)
        if not _fits_file_systems(key):
            raise StorageError(
                f"{uri}: {shown(key)!r} cannot be the name of a file; it is too long, or no text"
            )
        folder = next((str(folder) for folder in PurePosixPath(key).parents if str(folder) in names), None)
        if folder is not None:
            raise StorageError(
                f"{uri}: {shown(folder)!r} is listed as a file, and as the folder of {shown(key)!r}; remove one of them"
            )


def _fits_file_systems(key: str) -> bool:
    try:
        return (
            all(len(part.encode()) <= _LONGEST_NAME for part in key.split("/")) and len(key) <= _LONGEST_PATH
        )
    except UnicodeEncodeError:
        return False
