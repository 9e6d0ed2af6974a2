"""What names a store and an object in it."""

from __future__ import annotations

import os
import re

from expo_ray.errors import StorageError
from expo_ray.text import shown

SCHEMES = ("file", "s3", "hf", "memory")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_USER = re.compile(r"://[^/@]*@")


def split_uri(uri: str) -> tuple[str, str]:
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
        return "file", uri
    scheme, rest = match[1].lower(), match[2]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{redact(uri)}: unknown scheme {scheme}://; use a local path or one of {known}")
    if scheme != "file" and _USER.match(f"://{rest}"):
        raise StorageError(
            f"{redact(uri)}: credentials do not belong in a URI, it is written into logs and manifests; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or HF_TOKEN instead"
        )
    return scheme, rest


def check_name(path: str) -> str:
    """`path` itself.

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


def redact(uri: str) -> str:
    """The URI without what may be a secret: user and password before the host, everything after `?`."""
    return _USER.sub("://***@", uri).partition("?")[0] if _SCHEME.fullmatch(uri) else uri


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
        StorageError: if `uri` names a bucket or a folder.
    """
    folder, slash, name = uri.rpartition("/")
    if not name or folder.endswith(":/"):
        raise StorageError(f"{redact(uri)}: names no file; give its whole path")
    return (folder or "/") if slash else ".", name


def split_bucket(rest: str) -> tuple[str, str]:
    """Bucket (or name) and folder of `bucket/folder`, without empty parts."""
    name, _, folder = rest.partition("/")
    return name, "/".join(filter(None, folder.split("/")))


def check_key(key: str, uri: str) -> str:
    """`key` itself.

    Raises:
        StorageError: if it is not a plain relative path; keys also come from index files that anyone may have written.
    """
    if not key or "\\" in key or "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise StorageError(f"{uri}: {key!r} is not the name of a file below this folder")
    return key
