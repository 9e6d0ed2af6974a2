"""Entries of a local folder that are no plain files: listed with their fault, never read, and nothing waits for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from expo_ray.errors import NotFound, StorageError
from expo_ray.storage import open_store

MIB = 1 << 20


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # addresses are short


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ODD: dict[str, Callable[[Path], None]] = {
    "a FIFO": make_fifo,
    "a socket": make_socket,
    "a link to /dev/zero, a device": link_to("/dev/zero"),
    "a link to /nowhere, which leads nowhere (No such file or directory)": link_to("/nowhere"),
    "a link to x, which leads nowhere (Too many levels of symbolic links)": link_to("x"),
    "a link to /proc, a folder": link_to("/proc"),
}


@pytest.mark.parametrize("fault", ODD)
def test_what_is_no_file_is_listed_with_its_fault_and_never_read(fault: str, tmp_path: Path) -> None:
    ODD[fault](tmp_path / "x")
    store = open_store(str(tmp_path))
    (info,) = store.list()
    assert (info.key, info.size, info.fault) == ("x", 0, fault)
    for ask in (
        lambda: store.stat("x"),
        lambda: store.read("x"),
        lambda: store.read_into("x", 0, memoryview(bytearray(1)), etag=""),
    ):
        with pytest.raises((StorageError, NotFound)):
            ask()


def test_links_may_stay_in_the_folder_or_lead_into_the_cache_of_a_hub_client(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc" / "unet", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../blobs/0123")
    (snapshot / "same.json").symlink_to("config.json")
    (tmp_path / "secret").write_text("key")
    (snapshot / "license").symlink_to(tmp_path / "secret")
    (snapshot / "notice").symlink_to("../../../../../secret")
    (tmp_path / "whole").symlink_to(snapshot)  # a link to the folder as such is the user's own
    for folder in (snapshot, tmp_path / "whole"):
        faults = {info.key: info.fault for info in open_store(str(folder)).list()}
        assert faults.pop("config.json") == faults.pop("same.json") == ""
        assert all("outside of this folder" in fault for fault in faults.values())
        assert len(faults) == 2


def test_a_neighbour_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model-2").mkdir()
    (tmp_path / "model-2" / "a.json").write_text("{}")
    (tmp_path / "model" / "a.json").symlink_to("../model-2/a.json")
    (info,) = open_store(str(tmp_path / "model")).list()
    assert "outside" in info.fault


def test_names_that_no_key_can_hold_are_listed_with_their_fault(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/vocab\xff.json")).write_text("{}")
    for name in ("a\\b.json", "a\nb.json"):
        (tmp_path / name).write_text("{}")
    faults = {info.fault for info in open_store(str(tmp_path)).list()}
    assert faults == {"its name is not UTF-8", "a backslash or a control character in its name"}


def test_a_sparse_file_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    with (tmp_path / "expo.json").open("wb") as file:
        file.truncate(1 << 40)
    store = open_store(str(tmp_path))
    with pytest.raises(StorageError, match="1099511627776 bytes, more than the 1048576"):
        store.read("expo.json", most_bytes=MIB)
    with pytest.raises(StorageError, match="more than"):
        store.read("expo.json")
