"""Copies on the node that serves: the bytes of the store, fetched once, and noticed when they are touched."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.errors import InputChanged, NotFound, StorageError
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.serving.node_cache import (
    _download_once,
    _new_file,
    download_model,
    download_parents,
    rebuild_engine_folder,
)
from expo_ray.serving.weights import extrapolated, rows_of
from expo_ray.storage import FileInfo, open_store
from expo_ray.storage.memory import MemoryStore
from tests.support.pairs import files_of, read_weights, same_bits, write_pair


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def uploaded(folder: Path, name: str) -> str:
    """The folder's files in a store that is not on this node."""
    uri = f"memory://{folder.parent.name}/{name}"
    for key, data in files_of(folder).items():
        open_store(uri).put(key, data)
    return uri


@pytest.fixture
def plan(tmp_path: Path) -> PairPlan:
    sft, dpo = write_pair(tmp_path, sft_shards=2)
    return plan_pair(Pair(name="pair", sft=uploaded(sft, "sft"), dpo=uploaded(dpo, "dpo")), {})


def test_local_parents_are_used_where_they_are(tmp_path: Path, cache: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})
    assert download_parents(plan) == plan
    assert rebuild_engine_folder(plan) == dpo
    assert not cache.exists()


def test_parents_elsewhere_are_download_once_once_by_however_many_ask(
    plan: PairPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(8) as pool:
        (folder,) = set(pool.map(rebuild_engine_folder, [plan] * 8))
    fetched = {key: data for key, data in files_of(folder).items() if not key.startswith(".")}
    assert fetched == files_of(tmp_path / "dpo")
    monkeypatch.setattr(MemoryStore, "read_into", lambda *arguments, **options: pytest.fail("fetched again"))
    assert rebuild_engine_folder(plan) == folder
    download_parents(plan)


def test_a_copy_that_was_damaged_is_download_once_again(plan: PairPlan, tmp_path: Path) -> None:
    weights = rebuild_engine_folder(plan) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert (rebuild_engine_folder(plan) / "model.safetensors").read_bytes() == whole
    weights.write_bytes(whole[:-1])
    assert (rebuild_engine_folder(plan) / "model.safetensors").read_bytes() == whole
    os.utime(weights)  # touched, and the same: kept
    assert rebuild_engine_folder(plan) == weights.parent


def test_a_parent_that_was_replaced_is_refused_by_name(plan: PairPlan) -> None:
    open_store(plan.dpo.uri).put("config.json", b"{}")
    with pytest.raises(InputChanged, match=r"config\.json"):
        rebuild_engine_folder(plan)


def test_a_published_model_is_held_against_its_manifest(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert (
        main(["extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--alpha", "0.5", "--output", str(out)])
        == 0
    )
    assert download_model(str(out)) == out
    uri = uploaded(out, "out")
    assert same_bits(read_weights(download_model(uri)), read_weights(out))
    weights = (out / "model.safetensors").read_bytes()
    open_store(uri).put("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"model\.safetensors: its sha256 is .* the manifest says"):
        download_model(uri)
    with pytest.raises(NotFound, match="no such folder"):
        download_model("memory://nowhere/model")


def test_a_disk_without_room_is_reported_before_anything_is_downloaded(
    plan: PairPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo_ray.serving.cache_room.free_bytes", lambda folder: 1000)
    with pytest.raises(
        StorageError, match="are to be fetched, 1 kB are free; free space, or set EXPO_RAY_CACHE"
    ):
        rebuild_engine_folder(plan)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 2.0])
def test_the_weights_of_a_swap_are_the_bytes_of_the_published_shards(tmp_path: Path, alpha: float) -> None:
    sft, dpo = write_pair(tmp_path, dpo_shards=2)
    out = tmp_path / "out"
    assert (
        main(
            ["extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--alpha", str(alpha), "--output", str(out)]
        )
        == 0
    )
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo), shard_size=30_000), {})
    assert len(plan.shards) > 2
    published = read_weights(out)
    assert same_bits(dict(extrapolated(plan, alpha)), published)
    picked = {"model.embed_tokens.weight": [0, 7, 255], "model.norm.weight": [3, 4], "lm_head.weight": [9]}
    rows = rows_of(plan, picked, alpha)
    assert same_bits(rows, {name: published[name][list(picked[name])] for name in rows})
    assert rows.keys() == picked.keys()


@pytest.mark.parametrize(
    "key",
    [
        "../victim.txt",
        "../../../victim.txt",
        "a/../../victim.txt",
        "/tmp/victim.txt",
        "a//victim.txt",
        "./victim.txt",
        "..\\victim.txt",
        "C:\\victim.txt",
        "a\nb",
        "a\0b",
        "x" * 300,
        "\ud800",
        "config.json/x",
        ".complete.json",
        "",
    ],
)
@pytest.mark.parametrize("size", [0, 5])
def test_a_listing_writes_nothing_outside_its_folder(
    tmp_path: Path, key: str, size: int, cache: Path
) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")

    class Listed(MemoryStore):
        def list(self, prefix: str = "") -> list[FileInfo]:
            return [FileInfo("config.json", 2, "e"), FileInfo(key, size, "e")]

        def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
            out[:] = b"x" * len(out)

    store = Listed("memory://hostile/model")
    with pytest.raises(StorageError):
        _download_once(store, {info.key: info for info in store.list()})

    assert victim.read_text() == "precious"
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_two_keys_that_are_one_name_on_this_disk_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a file system that takes both for one would show this")

    with pytest.raises(StorageError, match="one name"):
        _new_file(tmp_path / "README.md", MemoryStore("memory://any/model"), "readme.md")
