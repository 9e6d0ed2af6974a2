"""A home for the caches of other packages, on machines whose user has none that can be written.

Containers run as users without an entry in /etc/passwd, without HOME, or with HOME on a read-only file system; torch, vLLM, Triton,
FlashInfer and matplotlib write below it nevertheless, and end with a traceback where they cannot.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from expo_ray.errors import StorageError
from expo_ray.storage.local_writer import check_writable
from expo_ray.storage.uri import expand_home

# Holds the folder that took the place of a missing HOME, so that `~` in a path is not taken for it.
MADE_UP = "EXPO_RAY_MADE_UP_HOME"
CACHE_VARIABLE = "EXPO_RAY_CACHE"


def prepare_home() -> None:
    """Point the variables that name caches to a private temporary folder, unless the user's own can be written.

    Variables that are set stay; the Hugging Face cache stays where it is if it is there, as the token lies in it.
    """
    home = os.path.expanduser("~")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if not _has_name():
        os.environ["USER"] = str(os.getuid())  # torch names a folder after the user
    if os.path.isabs(caches) and _is_writable(caches):
        return
    folder = _private_folder()
    if not os.path.isabs(home):
        os.environ["HOME"] = os.environ[MADE_UP] = folder
    hub = os.path.join(caches, "huggingface")
    if os.path.isabs(hub) and os.path.isdir(hub):
        os.environ.setdefault("HF_HOME", hub)
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
    os.environ.setdefault("XDG_CONFIG_HOME", os.path.join(folder, "config"))
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(folder, "matplotlib"))
    for name in ("FLASHINFER_WORKSPACE_BASE", "TRITON_HOME", "RAYLLM_HOME_DIR"):
        os.environ.setdefault(name, folder)


def cache_folder() -> Path:
    """Folder of our own copies on this node: `$EXPO_RAY_CACHE`, else `expo-ray` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.abspath(expand_home(chosen)))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "expo-ray"


def _has_name() -> bool:
    try:
        return bool(getpass.getuser())
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return False


def _is_writable(folder: str) -> bool:
    try:
        check_writable(folder)
    except StorageError:
        return False
    return True


def _private_folder() -> str:
    """A folder that only this user can enter, the same for all its processes unless somebody else has taken the name."""
    folder = os.path.join(tempfile.gettempdir(), f"expo-ray-home-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        state = os.lstat(folder)
        if os.path.isdir(folder) and state.st_uid == os.getuid() and not (state.st_mode & 0o077):
            return folder
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="expo-ray-home-")
