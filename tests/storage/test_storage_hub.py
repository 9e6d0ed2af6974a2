"""The Hub, against a stand-in server and through the real huggingface_hub: pinned, ranged, cached, and clear about what is missing."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from expo_ray.errors import InputChanged, NotFound, StorageError, TransientStorageError
from expo_ray.storage import Store, forget_stores, hub, open_store, retry
from expo_ray.storage.hub import HubStore
from tests.support.hub_server import TOKEN, HubServer, Repository

OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = random.Random(7).randbytes(300_000)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/config.json": b"[]"}


@pytest.fixture
def server(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    hub_server.repositories["org/model"] = Repository(
        {OLD: dict(FILES), NEW: {**FILES, "model.safetensors": WEIGHTS[::-1]}},
        {"main": NEW, "v1": OLD, "refs/pr/3": OLD, "feature/x": OLD},
    )
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(hub, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(hub, "LOOKUP_TIMEOUT_S", 1.0)
    return hub_server


def _read(store: Store, start: int, size: int) -> bytes:
    out = bytearray(size)
    store.read_into("model.safetensors", start, memoryview(out), etag=store.stat("model.safetensors").etag)
    return bytes(out)


# --- revisions


@pytest.mark.parametrize(
    ("uri", "commit"),
    [
        ("hf://org/model", NEW),
        ("hf://org/model@main", NEW),
        ("hf://org/model@v1", OLD),
        ("hf://org/model@refs/pr/3", OLD),
        ("hf://org/model@feature%2Fx", OLD),
        (f"hf://org/model@{OLD}", OLD),
    ],
)
def test_a_revision_is_pinned_to_its_commit(server: HubServer, uri: str, commit: str) -> None:
    store = open_store(uri)
    assert isinstance(store, HubStore)
    assert store.revision == commit
    assert store.uri == f"hf://org/model@{commit}"
    assert _read(store, 5, 100) == (WEIGHTS if commit == OLD else WEIGHTS[::-1])[5:105]


def test_a_branch_that_moves_does_not_move_the_store(server: HubServer) -> None:
    store = open_store("hf://org/model")
    etag = store.stat("model.safetensors").etag
    server.repositories["org/model"].branches["main"] = OLD
    forget_stores()
    assert pickle.loads(pickle.dumps(store)).stat("model.safetensors").etag == etag
    assert _read(open_store(store.uri), 0, 10) == WEIGHTS[::-1][:10]
    with pytest.raises(InputChanged):  # opening the branch again says so
        open_store("hf://org/model").read_into("model.safetensors", 0, memoryview(bytearray(1)), etag=etag)


def test_a_folder_of_a_repository(server: HubServer) -> None:
    store = open_store("hf://org/model@v1/sub")
    assert [info.key for info in store.list()] == ["config.json"]
    assert store.read("config.json") == b"[]"
    assert store.uri == f"hf://org/model@{OLD}/sub"


def test_etags_are_the_digests_of_the_hub(server: HubServer) -> None:
    import hashlib

    store = open_store("hf://org/model@v1")
    assert store.stat("model.safetensors").etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert store.stat("config.json").etag == hashlib.sha1(b"blob 2\0{}").hexdigest()


# --- ranges and the cache


def test_ranges_are_fetched_and_nothing_else(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store = open_store("hf://org/model@v1")
    for start in range(0, 300_000, 50_000):
        assert _read(store, start, 1000) == WEIGHTS[start : start + 1000]
    contents = [seen for seen in server.seen if "model.safetensors" in seen.path]
    assert all(
        seen.range.endswith(f"{int(seen.range.split('=')[1].split('-')[0]) + 999}") for seen in contents
    )
    assert len([seen for seen in contents if "/resolve/" in seen.path]) == 1
    assert {(seen.authorized, "/cdn/" in seen.path) for seen in contents} == {(True, False), (False, True)}


def test_a_model_is_looked_up_once(server: HubServer) -> None:
    store = open_store("hf://org/model@v1")
    for _ in range(3):
        store.list()
        store.stat("config.json")
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [503, 429, "stall"])
def test_looking_up_survives(server: HubServer, fault: int | str) -> None:
    server.api_faults = [fault]
    assert len(open_store("hf://org/model@v1").list()) == 3
    assert len(server.seen) == 2


def test_what_is_cached_is_read_from_disk(server: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/model", "model.safetensors", revision=OLD, endpoint=server.endpoint)
    store = open_store("hf://org/model@v1")
    store.list()
    server.seen.clear()
    assert _read(store, 12345, 1000) == WEIGHTS[12345:13345]
    assert server.seen == []
    assert (
        _read(open_store("hf://org/model@main"), 0, 10) == WEIGHTS[::-1][:10]
    )  # the cache holds another commit


def test_small_files_land_in_the_cache(server: HubServer) -> None:
    store = open_store("hf://org/model@v1")
    assert store.read("config.json") == b"{}"
    server.seen.clear()
    assert store.read("config.json") == b"{}"
    assert server.seen == []


def test_a_partial_file_in_the_cache_is_not_believed(server: HubServer) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download("org/model", "model.safetensors", revision=OLD, endpoint=server.endpoint)
    Path(path).resolve().write_bytes(WEIGHTS[:1000])
    assert _read(open_store("hf://org/model@v1"), 0, 500) == WEIGHTS[:500]
    assert any("/cdn/" in seen.path and seen.range == "bytes=0-499" for seen in server.seen)


# --- faults


@pytest.mark.parametrize("fault", [503, 429, 500, "truncate", "flip", "stall"])
def test_a_range_survives(server: HubServer, fault: int | str) -> None:
    store = open_store("hf://org/model@v1")
    server.faults = [fault]
    assert _read(store, 1000, 200_000) == WEIGHTS[1000:201_000]
    assert server.faults == []


@pytest.mark.parametrize("key", ["config.json", "model.safetensors"])
def test_a_whole_file_damaged_on_its_way_is_fetched_again(server: HubServer, key: str) -> None:
    store = open_store("hf://org/model@v1")
    server.faults = ["flip"]
    assert store.read(key) == FILES[key]
    assert server.faults == []
    server.faults = ["flip"] * 2
    forget_stores()
    with pytest.raises(
        TransientStorageError, match=rf"sub/config.json: .*digest {store.stat('sub/config.json').etag}"
    ):
        store.read("sub/config.json")


@pytest.mark.parametrize("fault", [503, "truncate"])
def test_a_range_that_never_comes_is_given_up(server: HubServer, fault: int | str) -> None:
    store = open_store("hf://org/model@v1")
    server.faults = [fault] * 100
    with pytest.raises(TransientStorageError, match=rf"{store.uri}/model.safetensors: .*asked 6 times"):
        _read(store, 0, 1000)
    assert len(server.faults) == 100 - retry.ATTEMPTS


def test_a_signed_address_that_expires_is_asked_for_again(server: HubServer) -> None:
    server.expire_after = 3
    store = open_store("hf://org/model@v1")
    for start in range(0, 300_000, 50_000):
        assert _read(store, start, 1000) == WEIGHTS[start : start + 1000]
    assert 3 <= len(server.served) <= 5


def test_a_hub_that_does_not_answer_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        TransientStorageError, match=r"hf://org/model: no complete answer from http://127.0.0.1:1"
    ):
        open_store("hf://org/model")


# --- what only the user can fix


def test_a_private_model_needs_the_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["org/model"].private = True
    with pytest.raises(NotFound, match=r"hf://org/model: no such model .* or a private one; .*HF_TOKEN"):
        open_store("hf://org/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store = open_store("hf://org/model")
    assert store.read("config.json") == b"{}"
    assert _read(store, 0, 10) == WEIGHTS[::-1][:10]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotFound, match="HF_TOKEN"):
        open_store(f"hf://org/model@{OLD}")


def test_a_gated_model_says_where_to_ask(server: HubServer) -> None:
    server.repositories["org/model"].gated = True
    store = open_store("hf://org/model")
    said = rf"gated; accept its terms at {server.endpoint}/org/model, and set HF_TOKEN"
    with pytest.raises(StorageError, match=said):
        store.read("config.json")
    with pytest.raises(StorageError, match=said):
        _read(store, 0, 10)


def test_a_missing_model_and_revision_are_named(server: HubServer) -> None:
    with pytest.raises(NotFound, match=r"hf://org/nothing: no such model"):
        open_store("hf://org/nothing")
    with pytest.raises(NotFound, match=r"hf://org/model@v9: no such revision"):
        open_store("hf://org/model@v9")


def test_offline_mode_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"HF_HUB_OFFLINE is set; unset it, or give a local folder"):
        open_store("hf://org/model")


def test_the_hub_is_read_only(server: HubServer) -> None:
    store = open_store("hf://org/model")
    for write in (
        lambda: store.put("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.writer("a", 1),
        lambda: store.delete("config.json"),
    ):
        with pytest.raises(StorageError, match=r"the Hub is only read from here; .*`expo-ray push`"):
            write()


# --- what a hostile Hub or mirror lists and answers


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a\\x", "a\nb", "\ud800", "config.json/x"])
def test_a_listing_with_a_name_that_leaves_its_folder_is_refused(server: HubServer, key: str) -> None:
    server.repositories["org/model"].files[NEW][key] = b""
    with pytest.raises(StorageError):
        open_store("hf://org/model")


@pytest.mark.parametrize(
    "header",
    [{"Content-Range": "bytes 0-99/300001"}, {"Content-Range": "bytes 1-100/300000"}, {"X-Repo-Commit": OLD}],
)
def test_an_answer_of_another_version_is_found_out(server: HubServer, header: dict[str, str]) -> None:
    store = open_store("hf://org/model")
    server.forged = header
    with pytest.raises(InputChanged):
        _read(store, 0, 100)


@pytest.mark.parametrize("token", ["hf_CANARY\u00e9abcdefgh", "hf_CANARY\x01abcdefgh"])
def test_a_token_that_no_request_can_carry_is_refused_without_showing_it(
    server: HubServer, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(StorageError, match="HF_TOKEN") as caught:
        open_store("hf://org/model")
    assert "CANARY" not in str(caught.value)
