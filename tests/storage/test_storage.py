"""One suite over every store: what the protocol promises, local folders, S3, the in-memory twin and, for reading, the Hub keep."""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import random
import resource
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import pytest

from expo_ray.errors import AlreadyExists, InputChanged, NotFound, StorageError
from expo_ray.storage import (
    FileInfo,
    Store,
    Writer,
    check_conditional_writes,
    join_uri,
    local_path,
    open_store,
    split_file,
)
from expo_ray.storage.local import LocalStore
from expo_ray.storage.local_writer import TEMP_PREFIX
from expo_ray.storage.memory import MemoryStore
from expo_ray.storage.uri import SCHEMES
from tests.support.hub_server import HubServer, Repository

MIB = 1 << 20
COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": random.Random(1).randbytes(3 * MIB + 17),
    "model-00002-of-00002.safetensors": random.Random(2).randbytes(5000),
    "nested/a.json": b"[]",
}

CLOUDS = {"s3": "s3_uri", "gcs": "gcs_uri", "azure": "azure_uri"}
WRITABLE = ["local", "memory", *(pytest.param(cloud, marks=pytest.mark.s3) for cloud in CLOUDS)]


def _root(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "local":
        return str(tmp_path / "store")
    if kind == "memory":
        return f"memory://{uuid.uuid4().hex}/folder"
    return str(request.getfixturevalue(CLOUDS[kind]))


@pytest.fixture(params=WRITABLE)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(_root(request.param, request, tmp_path))


@pytest.fixture(params=[*WRITABLE, "hub"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store that holds FILES."""
    if request.param == "hub":
        server: HubServer = request.getfixturevalue("hub_server")
        server.repositories["org/model"] = Repository({COMMIT: dict(FILES)}, {"main": COMMIT})
        return open_store("hf://org/model")
    store = open_store(_root(request.param, request, tmp_path))
    for key, data in FILES.items():
        store.put(key, data)
    return store


# --- reading


def test_list_names_every_object_once_sorted_as_stat_sees_it(filled: Store) -> None:
    listed = filled.list()
    assert [(info.key, info.size) for info in listed] == [
        (key, len(data)) for key, data in sorted(FILES.items())
    ]
    assert listed == [filled.stat(key) for key in sorted(FILES)]
    assert len({info.etag for info in listed}) == len(FILES)


@pytest.mark.parametrize("prefix", ["model-0000", "nested/", "nested/a", "nes", "nothing", "config.json"])
def test_list_takes_a_prefix_by_characters(filled: Store, prefix: str) -> None:
    assert [info.key for info in filled.list(prefix)] == sorted(
        key for key in FILES if key.startswith(prefix)
    )


def test_read_gives_the_bytes(filled: Store) -> None:
    for key in ("config.json", "nested/a.json", "model-00002-of-00002.safetensors"):
        assert filled.read(key) == FILES[key]


def test_read_is_bounded(filled: Store) -> None:
    assert filled.read("config.json", most_bytes=len(FILES["config.json"])) == FILES["config.json"]
    with pytest.raises(StorageError, match="more than the"):
        filled.read("config.json", most_bytes=len(FILES["config.json"]) - 1)


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 1), (0, 8), (12345, 2 * MIB), (3 * MIB + 16, 1), (0, 3 * MIB + 17), (7, 0), (3 * MIB + 17, 0)],
)
def test_read_into_fills_exactly_the_range(filled: Store, start: int, size: int) -> None:
    key = "model-00001-of-00002.safetensors"
    around = bytearray(b"\xaa" * (size + 20))
    filled.read_into(key, start, memoryview(around)[10 : 10 + size], etag=filled.stat(key).etag)
    assert around == b"\xaa" * 10 + FILES[key][start : start + size] + b"\xaa" * 10


def test_read_into_from_many_threads(filled: Store) -> None:
    key = "model-00001-of-00002.safetensors"
    etag = filled.stat(key).etag

    def part(start: int) -> bytes:
        out = bytearray(100_000)
        filled.read_into(key, start, memoryview(out), etag=etag)
        return bytes(out)

    starts = [random.Random(3).randrange(3 * MIB - 100_000) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for start, data in zip(starts, pool.map(part, starts), strict=True):
            assert data == FILES[key][start : start + 100_000]


@pytest.mark.parametrize("start", [3 * MIB, 4 * MIB])
def test_a_file_that_ends_early_is_named(filled: Store, start: int) -> None:
    key = "model-00001-of-00002.safetensors"
    with pytest.raises(StorageError, match=rf"{key} ends") as caught:
        filled.read_into(key, start, memoryview(bytearray(100)), etag=filled.stat(key).etag)
    assert not isinstance(caught.value, InputChanged)


def test_another_version_is_refused(filled: Store) -> None:
    with pytest.raises(InputChanged, match="plan"):
        filled.read_into("config.json", 0, memoryview(bytearray(4)), etag='"another"')


def test_what_is_missing_is_not_found(filled: Store) -> None:
    with pytest.raises(NotFound, match=r"missing\.json"):
        filled.stat("missing.json")
    with pytest.raises(NotFound, match=r"missing\.json"):
        filled.read("missing.json")
    with pytest.raises(NotFound, match=r"missing\.json"):
        filled.read_into("missing.json", 0, memoryview(bytearray(4)), etag="x")
    with pytest.raises(NotFound):
        filled.stat("nested")


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "/etc/passwd", "a//b", "a/../../b", "a/", "a\\b", "a\0b"]
)
def test_a_key_cannot_leave_the_folder(filled: Store, key: str) -> None:
    for use in (
        filled.stat,
        filled.read,
        filled.delete,
        lambda k: filled.put(k, b"x"),
        lambda k: filled.writer(k, 1),
    ):
        with pytest.raises(StorageError):
            use(key)


def test_a_pickled_store_reads_the_same(filled: Store) -> None:
    again = pickle.loads(pickle.dumps(filled))
    assert again.uri == filled.uri
    assert again.list() == filled.list()
    assert len(pickle.dumps(filled)) < 1000


# --- writing


def test_an_empty_folder_lists_nothing(store: Store) -> None:
    assert store.list() == []
    assert store.list("deep/er") == []


@pytest.mark.parametrize("key", ["alpha=0.5/.expo/claim.json", "a b/c+d%25#é@~.json", "x" * 200])
def test_odd_names_survive(store: Store, key: str) -> None:
    info = store.put(key, b"odd")
    assert info == store.stat(key)
    assert store.list() == [info]
    assert store.read(key) == b"odd"


def test_put_replaces(store: Store) -> None:
    first = store.put("a", b"one")
    second = store.put("a", b"two")
    assert store.read("a") == b"two"
    assert first.etag != second.etag
    with pytest.raises(InputChanged):
        store.read_into("a", 0, memoryview(bytearray(3)), etag=first.etag)


def test_put_if_absent(store: Store) -> None:
    info = store.put_if_absent("claim.json", b"mine")
    assert info == store.stat("claim.json")
    assert store.put_if_absent("claim.json", b"mine").etag == info.etag
    with pytest.raises(AlreadyExists, match=r"claim\.json"):
        store.put_if_absent("claim.json", b"other")
    assert store.read("claim.json") == b"mine"
    assert [info.key for info in store.list()] == ["claim.json"]


def test_put_if_absent_has_one_winner(store: Store) -> None:
    def claim(number: int) -> int | None:
        with suppress(AlreadyExists):
            store.put_if_absent("claim.json", b"%d" % number)
            return number
        return None

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(claim, range(16)) if number is not None]
    assert len(winners) == 1
    assert store.read("claim.json") == b"%d" % winners[0]


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 20 * MIB + 3])
def test_a_written_file_appears_at_commit(store: Store, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with store.writer("deep/model.safetensors", size) as writer:
        done = 0
        buffer = bytearray(
            MIB
        )  # one buffer for all, as in a pipeline: it must not be read after `write` returns
        while done < size:
            piece = data[done : done + random.Random(done).randint(1, MIB)]
            buffer[: len(piece)] = piece
            writer.write(memoryview(buffer)[: len(piece)])
            done += len(piece)
        assert store.list() == []
        info = writer.commit()
    assert info == FileInfo("deep/model.safetensors", size, info.etag) == store.stat("deep/model.safetensors")
    assert store.read("deep/model.safetensors") == data
    assert store.list() == [info]


@pytest.mark.parametrize(
    ("sizes", "past_cache"),
    [
        ([4 * MIB, 4 * MIB, 300_001], 8 * MIB + 73 * 4096),
        ([4 * MIB, MIB + 4096, 5, MIB], 5 * MIB + 4096),
        ([17, 2 * MIB], 0),
        ([8192, 8192], 0),
    ],
)
@pytest.mark.parametrize("misplaced", [0, 1])
def test_large_local_writes_pass_by_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], past_cache: int, misplaced: int
) -> None:
    """Where position and address allow it; else they are written as any other, in the same order."""
    room = memoryview(mmap.mmap(-1, 8 * MIB))  # begins at a page of memory
    direct, real = 0, os.write

    def watched(fd: int, data: memoryview) -> int:
        nonlocal direct
        written = real(fd, data)
        direct += written if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else 0
        return written

    monkeypatch.setattr(os, "write", watched)
    expected = random.Random(7).randbytes(sum(sizes))
    with LocalStore(str(tmp_path)).writer("model", len(expected)) as writer:
        for end, size in zip(accumulate(sizes), sizes, strict=True):
            page = room[misplaced : misplaced + size]
            page[:] = expected[end - size : end]
            writer.write(page)
        writer.commit()
    assert (tmp_path / "model").read_bytes() == expected
    assert direct == (past_cache if _allows_direct_writes(tmp_path) and not misplaced else 0)


def _allows_direct_writes(folder: Path) -> bool:
    with suppress(OSError):
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        return True
    return False


def _write_and_commit(writer: Writer, data: bytes) -> None:
    writer.write(data)
    writer.commit()


@pytest.mark.parametrize("written", [0, 5, 12 * MIB])
def test_a_file_of_another_size_than_announced_does_not_appear(store: Store, written: int) -> None:
    with (
        store.writer("model.safetensors", written + 1) as writer,
        pytest.raises(StorageError, match=f"{written} bytes written, {written + 1} announced"),
    ):
        _write_and_commit(writer, bytes(written))
    with (
        store.writer("model.safetensors", written) as writer,
        pytest.raises(StorageError, match=f"more than the {written} bytes announced"),
    ):
        writer.write(bytes(written + 1))
    assert store.list() == []


@pytest.mark.parametrize("size", [5, 20 * MIB])
def test_an_aborted_file_leaves_what_was_there(store: Store, size: int) -> None:
    before = store.put("model.safetensors", b"before")
    writer = store.writer("model.safetensors", size)
    writer.write(bytes(size))
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    writer.abort()
    assert store.list() == [before]


def test_abort_after_commit_is_harmless(store: Store) -> None:
    with store.writer("a", 3) as writer:
        writer.write(b"abc")
        writer.commit()
        writer.abort()
    assert store.read("a") == b"abc"


def test_delete(store: Store) -> None:
    store.put("a", b"1")
    store.put("b", b"2")
    store.delete("a")
    store.delete("a")
    assert [info.key for info in store.list()] == ["b"]


def test_stores_keep_conditional_writes_and_the_probe_leaves_nothing(store: Store) -> None:
    check_conditional_writes(store)
    assert store.list() == []


class _CarelessStore(MemoryStore):
    """Like S3 servers that ignore `If-None-Match`."""

    def put_if_absent(self, key: str, data: bytes) -> FileInfo:
        return self.put(key, data)


def test_a_store_that_overwrites_is_found_out() -> None:
    store = _CarelessStore(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(StorageError, match="If-None-Match"):
        check_conditional_writes(store)
    assert store.list() == []


# --- URIs


def test_local_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"x")
    for uri in ("a b", "./a b/", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        store = open_store(uri)
        assert store.uri == str(tmp_path / "a b")
        assert store.read("x") == b"x"


@pytest.mark.parametrize("uri", ["abfs://bucket/x", "https://host/x", "nonsense://x"])
def test_an_unknown_scheme_names_the_known_ones(uri: str) -> None:
    with pytest.raises(StorageError, match=r"file://, s3://, gs://, az://, hf://, memory://"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hush@bucket/x",
        "gs://key:hush@bucket/x",
        "az://box/x?sig=hush",
        "https://h/x?sig=hush",
        "hf://hush@org/n",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_store(uri)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s3://",
        "s3:///x",
        "gs://",
        "az:///x",
        "memory://",
        "file://relative",
        "hf://name-only",
        "hf://datasets/a/b",
    ],
)
def test_an_incomplete_uri_is_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        open_store(uri)


@pytest.mark.parametrize(
    ("root", "parts", "joined"),
    [
        ("s3://b/x/", ["/pairs/z", "c.json"], "s3://b/x/pairs/z/c.json"),
        ("s3://b", ["c"], "s3://b/c"),
        ("/", ["a"], "/a"),
        ("/a/", [], "/a"),
        ("out", ["alpha=0.5", ""], "out/alpha=0.5"),
        ("hf://o/n@main", ["sub"], "hf://o/n@main/sub"),
    ],
)
def test_join_uri(root: str, parts: list[str], joined: str) -> None:
    assert join_uri(root, *parts) == joined


def test_one_store_per_uri_and_process() -> None:
    assert open_store("memory://cached/x") is open_store("memory://cached/x/")


def test_importing_storage_loads_no_client() -> None:
    code = "import sys, expo_ray.storage; print(sorted({'obstore', 'boto3', 'httpx', 'httpx2', 'huggingface_hub'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# --- what only a local folder can do wrong


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_is_left(small_disk: Path) -> None:
    store = open_store(str(small_disk))
    store.put("before", b"before")
    with (
        store.writer("model", 4 * MIB) as writer,
        pytest.raises(
            StorageError, match=rf"{small_disk}/model: No space left on device; free space"
        ) as caught,
    ):
        writer.write(bytes(4 * MIB))
    assert "another output" in str(caught.value)
    with pytest.raises(StorageError, match="No space left"):
        store.put("model", bytes(2 * MIB))
    with pytest.raises(StorageError, match="No space left"):
        store.put_if_absent("model", bytes(2 * MIB))
    assert os.listdir(small_disk) == ["before"]


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = open_store(str(small_disk / "out"))
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=rf"{small_disk}/out/a: Read-only file system; choose"):
            write("a", b"x")


def test_a_limit_on_file_size_is_named(tmp_path: Path) -> None:
    code = f"""
import resource
from expo_ray.storage import open_store
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    open_store({str(tmp_path)!r}).put("model", bytes(2 << 20))
except Exception as error:
    print(type(error).__name__, error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"StorageError {tmp_path}/model: File too large; ")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        open_store(str(tmp_path / "file")).put("below", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="Is a directory; it is a folder"):
        open_store(str(tmp_path)).put("folder", b"x")


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    def noting(name: str, do: Callable[..., None]) -> None:
        def noted(target: int | Path, *more: Path) -> None:
            folder = isinstance(target, int) and stat.S_ISDIR(os.fstat(target).st_mode)
            did.append(f"{name} folder" if folder else name)
            do(target, *more)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "replace", "link"):
        noting(name, getattr(os, name))
    store = open_store(str(tmp_path))
    store.put("a", b"a")
    store.put_if_absent("b", b"b")
    assert did == ["fsync", "replace", "fsync folder", "fsync", "link", "fsync folder"]


def test_temp_files_are_not_listed_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"12345")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / f"{TEMP_PREFIX}123").write_bytes(b"left by kill -9")
    (folder / "model").symlink_to("../blob")
    (folder / "gone").symlink_to("../nothing")
    store = open_store(str(folder))
    assert [(info.key, info.size) for info in store.list()] == [("gone", 0), ("model", 5)]
    assert all(info.fault for info in store.list())


def test_a_file_rewritten_in_place_is_found_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    info = store.put("model", bytes(100))
    with (tmp_path / "model").open("r+b") as file:
        file.write(b"x")
    os.utime(tmp_path / "model", ns=(1, int(info.etag.split("-")[0]) + 1))
    with pytest.raises(InputChanged, match="model"):
        store.read_into("model", 0, memoryview(bytearray(100)), etag=info.etag)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from expo_ray.storage import open_store\n"
        "writer = open_store(sys.argv[1]).writer('model', 8)\n"
        "writer.write(b'half')\n"
        "print('writing', flush=True)\n"
        "time.sleep(60)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"writing\n"
    store = open_store(str(tmp_path))
    with store.writer("model", 4) as living:
        assert len(list(tmp_path.glob(".partial-*"))) == 2  # the other process is alive: its file stays
        killed.kill()
        killed.wait()
        store.put("other", b"data")
        assert len(list(tmp_path.glob(".partial-*"))) == 1
        living.write(b"done")
        living.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]
    assert store.read("model") == b"done"


def test_one_function_decides_what_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in (str(tmp_path / "model"), "model", "./model/", "~/model", f"file://{tmp_path}/model"):
        assert local_path(uri) == open_store(uri).local_path == tmp_path / "model"
    assert local_path(f"FILE://{tmp_path}/a%20b") == tmp_path / "a b"
    for uri in ("s3://bucket/model", "hf://org/name", "memory://name/model"):
        assert local_path(uri) is None
    assert open_store("memory://name/model").local_path is None


@pytest.mark.parametrize("uri", ["abfs://box/model", "adl://model", "https://host/model"])
def test_a_scheme_without_a_store_is_refused_with_those_that_have_one(uri: str) -> None:
    for function in (local_path, open_store, split_file):
        with pytest.raises(StorageError) as raised:
            function(uri)
        assert all(f"{scheme}://" in str(raised.value) for scheme in SCHEMES)
