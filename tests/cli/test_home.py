"""Caches of other packages where the user has no home, or one that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from expo_ray.errors import StorageError
from expo_ray.home import CACHE_VARIABLE
from expo_ray.serving.node_cache import download_model
from tests.support.paths import ROOT

# Prints where caches would go after the preparation, and what `~` is.
SHOW = """
import os, sys
from expo_ray.home import prepare_home
prepare_home()
import getpass
from pathlib import Path
print(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
print(os.environ.get("HF_HOME", ""))
print(Path.home())
print(getpass.getuser())  # torch names a folder after it
from expo_ray.storage.local import LocalStore
from expo_ray.errors import StorageError
try:
    print(LocalStore("~/x").uri)
except StorageError as error:
    print("refused")
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def shown(open_folder: Path, **environment: str) -> list[str]:
    """What `SHOW` prints for a user without a name, who can write only below `open_folder`."""
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    done = subprocess.run(
        ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable, "-c", SHOW],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(open_folder), **environment},
        cwd=open_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_missing_home_becomes_a_private_folder_that_no_path_means(open_folder: Path) -> None:
    caches, hub, home, _, path = shown(open_folder)
    private = Path(home)
    assert private.parent == open_folder
    assert private.stat().st_mode & 0o077 == 0
    assert caches == f"{home}/cache"
    assert hub == ""
    assert path == "refused"
    assert not (open_folder / "~").exists()
    assert shown(open_folder)[2] == home  # the next process finds it again


def test_a_home_that_cannot_be_written_keeps_its_hub_cache(open_folder: Path) -> None:
    home = open_folder / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    caches, hub, folder, _, path = shown(open_folder, HOME=str(home))
    assert not caches.startswith(str(home))
    assert hub == f"{home}/.cache/huggingface"
    assert folder == str(home)
    assert path == f"{home}/x"


def test_a_home_that_can_be_written_is_left_alone(open_folder: Path) -> None:
    home = open_folder / "home"
    home.mkdir()
    home.chmod(0o777)
    assert shown(open_folder, HOME=str(home))[0] == f"{home}/.cache"


def test_a_name_that_somebody_else_has_taken_is_avoided(open_folder: Path) -> None:
    (open_folder / "expo-ray-home-54321").symlink_to("/")
    caches = shown(open_folder)[0]
    assert caches.startswith(f"{open_folder}/expo-ray-home-")
    assert not caches.startswith(f"{open_folder}/expo-ray-home-54321/")


def test_a_cache_that_cannot_be_written_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expo_ray.storage import open_store

    store = open_store("memory://cached/model")
    store.put("config.json", b"{}")
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=f"set {CACHE_VARIABLE}"):
        download_model("memory://cached/model")
