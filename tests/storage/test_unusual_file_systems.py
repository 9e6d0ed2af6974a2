"""File systems without hard links, folder sync, locks or sizes keep the promises of a local folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expo_ray.errors import StorageError
from expo_ray.storage import local_writer
from expo_ray.storage.local import LocalStore
from expo_ray.storage.local_writer import TEMP_PREFIX, check_writable, free_bytes
from tests.support.disks import disk
from tests.support.pairs import expo, files_of, write_pair
from tests.support.paths import ROOT

EXPO = [sys.executable, "-m", "expo_ray.cli", "extrapolate", "--alpha", "0.5", "--rounding", "nearest"]

# Several processes put their own number at one key; each prints whether it won.
RACE = """
import sys
from expo_ray.errors import AlreadyExists
from expo_ray.storage.local import LocalStore
store = LocalStore(sys.argv[1])
for key in range(40):
    try:
        store.put_if_absent(f"key-{key}", sys.argv[2].encode() * 1000)
        print(key, sys.argv[2])
    except AlreadyExists:
        pass
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that takes operations away from the file systems of a process."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the file systems without hard links are not simulated")
    library = tmp_path_factory.mktemp("preload") / "unusual_file_system.so"
    source = ROOT / "tests" / "support" / "unusual_file_system.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def run(preload: str, words: list[str], **lacking: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        **{name: str(value) for name, value in lacking.items()},
    }
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("link", "rename"),
    [
        (errno.EPERM, None),
        (errno.ENOTSUP, errno.EINVAL),
        (errno.ENOSYS, errno.ENOSYS),
        (errno.EMLINK, None),
        (errno.EIO, errno.ENOTSUP),
    ],
)
def test_a_model_is_published_without_hard_links(
    tmp_path: Path, preload: str, link: int, rename: int | None
) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "expected", 0.5) == 0
    words = [*EXPO, "--sft", str(sft), "--dpo", str(dpo), "--output", str(tmp_path / "out")]
    lacking = {"LINK_ERRNO": link} | ({"RENAME_ERRNO": rename} if rename else {})
    done = run(preload, words, **lacking)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "expected").keys()
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "expected" / weights).read_bytes()
    assert not list((tmp_path / "out").rglob(f"{TEMP_PREFIX}*"))
    words[words.index("--alpha") + 1] = "1"  # the claim refuses another plan, as everywhere
    assert run(preload, words, **lacking).returncode == 2


@pytest.mark.parametrize("rename", [None, errno.EINVAL], ids=["renameat2", "reserved"])
def test_of_many_writers_one_wins_without_hard_links(
    tmp_path: Path, preload: str, rename: int | None
) -> None:
    lacking = {"LINK_ERRNO": errno.EPERM} | ({"RENAME_ERRNO": rename} if rename else {})
    environment = {**os.environ, "LD_PRELOAD": preload} | {name: str(code) for name, code in lacking.items()}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(number)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    won = [line.split() for writer in writers for line in writer.communicate()[0].splitlines()]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert sorted(int(key) for key, _ in won) == list(range(40))
    for key, number in won:
        assert (tmp_path / f"key-{key}").read_bytes() == number.encode() * 1000
    assert not list(tmp_path.glob(f"{TEMP_PREFIX}*"))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_is_taken(tmp_path: Path, preload: str, code: int) -> None:
    sft, dpo = write_pair(tmp_path)
    words = [*EXPO, "--sft", str(sft), "--dpo", str(dpo), "--output", str(tmp_path / "out")]
    done = run(preload, words, SYNC_FOLDER_ERRNO=code, SYNC_FILE_ERRNO=code)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path: Path, preload: str) -> None:
    sft, dpo = write_pair(tmp_path)
    words = [*EXPO, "--sft", str(sft), "--dpo", str(dpo), "--output", str(tmp_path / "out")]
    done = run(preload, words, SYNC_FILE_ERRNO=errno.EIO)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_file_system_that_knows_no_sizes_is_taken(tmp_path: Path, preload: str) -> None:
    sft, dpo = write_pair(tmp_path)
    words = [*EXPO, "--sft", str(sft), "--dpo", str(dpo), "--output", str(tmp_path / "out")]
    done = run(preload, words, NO_SIZES=1)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_not_taken_for_one_that_knows_no_sizes(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "all").write_bytes(bytes(2 << 20))
    assert free_bytes(str(small_disk)) == 0


def test_a_reservation_of_a_dead_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    left = tmp_path / f"{TEMP_PREFIX}reserved-key"
    left.touch()
    os.utime(left, (time.time() - 70,) * 2)
    LocalStore(str(tmp_path)).put_if_absent("key", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_reservation_at_work_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    monkeypatch.setattr(local_writer, "_RESERVED_S", 0.1)
    with (tmp_path / f"{TEMP_PREFIX}reserved-key").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"reserved this name; .* delete .*reserved-key"):
            LocalStore(str(tmp_path)).put_if_absent("key", b"data")
    assert not (tmp_path / "key").exists()


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(local_writer, "_rename_unless_taken", refuse)


def test_temp_files_of_another_machine_are_left_until_they_are_old(tmp_path: Path) -> None:
    foreign = tmp_path / f"{TEMP_PREFIX}{'0' * 12}-{'1' * 32}"
    foreign.touch()
    store = LocalStore(str(tmp_path))
    store.put("a", b"")
    assert foreign.exists()
    os.utime(foreign, (time.time() - 4000,) * 2)
    store.put("b", b"")
    assert not foreign.exists()


def test_a_fifo_named_like_a_temp_file_does_not_stop_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{TEMP_PREFIX}x")
    LocalStore(str(tmp_path)).put("a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data"


def test_an_output_that_cannot_be_written_is_found_without_writing(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StorageError, match="Read-only file system"):
            check_writable(str(folder / "new" / "folder"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file"):
        check_writable(str(tmp_path / "file" / "folder"))
    check_writable(str(tmp_path / "new" / "folder"))
