"""A node's cache with a size: what nobody uses makes way, what an engine uses stays, and two fetches never share room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expo_ray.errors import JobError, StorageError
from expo_ray.serving import cache_room, node_cache
from expo_ray.serving.cache_room import make_room
from expo_ray.serving.node_cache import download_model
from expo_ray.storage import open_store
from expo_ray.storage.memory import MemoryStore
from tests.support.hub_server import HubServer, Repository
from tests.support.paths import ROOT

SIZE = 100_000

# A process that uses a model of the cache, says so, and goes on until its standard input ends.
ENGINE = """
import sys
from pathlib import Path
from expo_ray.serving.node_cache import _download_once
from expo_ray.storage import FileInfo, open_store
from expo_ray.storage.memory import MemoryStore

store = open_store(f"memory://models/{sys.argv[1]}")
store.put("model.safetensors", bytes(int(sys.argv[2])))
print(_download_once(store, {info.key: info for info in store.list()}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_room, "_held", {})
    return tmp_path / "cache"


def engine(name: str, size: int = SIZE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENGINE, name, str(size)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The folder that it used, and what it had to complain of."""
    out, err = process.communicate(timeout=60)
    return out.strip(), err.strip().rpartition("\n")[2]


def copies(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir() if path.is_dir()}


def test_pairs_of_more_than_the_disk_holds_follow_each_other(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPO_RAY_CACHE_SIZE", str(3 * SIZE + 10_000))
    folders = []
    for number in range(5):
        folder, complaint = finish(engine(f"pair-{number}"))
        assert not complaint
        folders.append(Path(folder).name)
        os.utime(cache / "models" / f"{folders[-1]}.lease", (number, number))
    assert copies(cache) == set(folders[2:])  # the two that were not used for longest are gone
    finish(engine("pair-2"))  # used again: now 3 is the oldest
    finish(engine("pair-5"))
    assert folders[2] in copies(cache)
    assert folders[3] not in copies(cache)


def test_what_an_engine_uses_stays_and_the_error_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPO_RAY_CACHE_SIZE", str(2 * SIZE + 10_000))
    running = [engine("first"), engine("second")]
    in_use = {Path(process.stdout.readline().strip()).name for process in running if process.stdout}
    _, complaint = finish(engine("third"))
    assert "100 kB are to be fetched, EXPO_RAY_CACHE_SIZE is 210 kB" in complaint
    assert "200 kB are in use by other engines" in complaint
    assert "raise EXPO_RAY_CACHE_SIZE, or set EXPO_RAY_CACHE" in complaint
    assert copies(cache) == in_use
    running[0].kill()  # its lease ends with it
    running[0].communicate()
    folder, complaint = finish(engine("third"))
    assert not complaint
    finish(running[1])
    assert len(copies(cache) & in_use) == 1
    assert Path(folder).name in copies(cache)


def test_two_fetches_do_not_count_on_the_same_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_room, "free_bytes", lambda folder: 150_000)
    first, second = cache / "models" / "first", cache / "models" / "second"
    for folder in (first, second):
        folder.mkdir(parents=True)
        cache_room.lease(folder)
    make_room(first, SIZE)  # begun, and nothing has arrived
    with pytest.raises(
        StorageError, match="100 kB are to be fetched, 150 kB are free, and 100 kB are in use"
    ):
        make_room(second, SIZE)
    (first / "model.safetensors").write_bytes(bytes(SIZE))
    make_room(second, SIZE)


def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPO_RAY_CACHE_SIZE", "much")
    with pytest.raises(JobError, match=r"EXPO_RAY_CACHE_SIZE: .* write it like 5GB"):
        make_room(tmp_path / "x", 1)


def test_several_ranges_of_a_file_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    store = open_store("memory://ranges/model")
    data = os.urandom(400_000)
    store.put("config.json", b"{}")
    store.put("model.safetensors", data)
    monkeypatch.setattr(MemoryStore, "chunk_bytes", 100_000)
    together = threading.Barrier(4, timeout=30)
    read = MemoryStore.read_into

    def waits(self: MemoryStore, key: str, start: int, out: memoryview, **options: object) -> None:
        if key == "model.safetensors":
            together.wait()  # until four ranges of the file are being read
        read(self, key, start, out, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryStore, "read_into", waits)
    assert (download_model(store.uri) / "model.safetensors").read_bytes() == data
    assert node_cache._RANGES_OF_A_FILE >= 4


def test_a_bit_that_flips_on_the_way_from_the_hub_is_noticed(hub_server: HubServer) -> None:
    commit, data = "a" * 40, os.urandom(300_000)
    files = {"model.safetensors": data}
    hub_server.repositories["org/model"] = Repository({commit: files}, {"main": commit})
    uri = open_store("hf://org/model").uri
    hub_server.faults = ["flip"]
    hub_server.seen.clear()
    assert (download_model(uri) / "model.safetensors").read_bytes() == data
    assert not hub_server.faults
    fetched = [seen for seen in hub_server.seen if "/cdn/" in seen.path and seen.method == "GET"]
    assert len(fetched) == 2  # once damaged and once whole: its sha256 says which, and nothing is read twice
