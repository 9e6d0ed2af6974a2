"""Messages for a place where no folder is: often the user meant something that has another name."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from expo_ray.storage.protocol import Store
from expo_ray.text import shown

_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".safetensors", ".bin", ".json", ".gguf", ".pt", ".pth", ".nemo", ".ckpt")


def missing_folder(store: Store) -> str:
    """Message for the folder of a store that is not there or empty, with what the user may have meant."""
    uri, name = store.uri, shown(store.uri)
    if store.local_path is None and uri.lower().endswith(_FILE_ENDINGS):
        return f"{name}: not a folder; if it is a file, pass the folder that holds it, {shown(uri.rpartition('/')[0])}"
    reason = "" if store.local_path is None else _reason_here(uri)
    return f"{name}: {reason or 'no such folder, or nothing in it; check the path, and your access to it'}"


def _reason_here(path: str) -> str:
    """Reason that a local path is no folder of files; empty if nothing more is known."""
    if os.path.isfile(path):
        return f"is a file; pass its folder, {shown(os.path.dirname(path))}"
    if os.path.isdir(path):
        return "an empty folder; check the path, and whether the download ended"
    given = os.path.relpath(path)
    if meant := hub_uri(f"https://{given}"):
        return f"no such folder; did you mean {shown(meant)} on the Hugging Face Hub?"
    if _MODEL_ID.fullmatch(given):
        return f"no such folder; check the path, or did you mean hf://{given} on the Hugging Face Hub?"
    return ""


def hub_uri(url: str) -> str:
    """The `hf://` URI of a page on the Hugging Face Hub; empty if it is no model's."""
    try:
        parts = urlsplit(url)
    except ValueError:  # an address with half a bracket
        return ""
    path = [part for part in parts.path.split("/") if part]
    if (
        parts.hostname not in _HUB_HOSTS
        or len(path) < 2
        or path[0] in ("datasets", "spaces", "docs", "models")
    ):
        return ""
    repository = f"hf://{path[0]}/{path[1]}"
    if len(path) < 4 or path[2] not in ("tree", "blob", "resolve"):
        return repository
    folder = path[4:] if path[2] == "tree" else path[4:-1]
    return "/".join([repository + (f"@{path[3]}" if path[3] != "main" or folder else ""), *folder])
