"""`status.json`: which run wrote it, whether it lives, and how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from expo_ray import status_file
from expo_ray.status_file import MISSED, StatusFile, is_alive, read_status
from expo_ray.storage import FileInfo, open_store
from tests.support.ray_cluster import wait_until

RUNNING = """
import sys, time
from expo_ray import status_file
from expo_ray.storage import open_store
status_file.HEARTBEAT_S = 0.2
with status_file.StatusFile(open_store(sys.argv[1])):
    time.sleep(600)
"""


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.name}"


def test_every_run_of_a_job_has_its_number_and_its_end(uri: str) -> None:
    store = open_store(uri)
    with StatusFile(store) as first:
        assert read_status(store)["state"] == "running"
        first.show("search", lambda: {"responses": {"done": 3}})
        first.finish(["a pair"])
        first.finish(["a pair", "another"], published=2)
    ended = read_status(store)
    assert (ended["state"], ended["attempt"], ended["run"]) == ("failed", 1, first.run)
    assert (ended["stage"], ended["responses"], ended["published"]) == ("search", {"done": 3}, 2)
    assert ended["failed"] == ["a pair", "another"]
    with StatusFile(store) as second:
        pass
    assert (read_status(store)["state"], second.attempt) == ("done", 2)
    assert second.run != first.run
    for error, state in ((KeyboardInterrupt, "interrupted"), (ValueError, "failed")):
        with pytest.raises(error), StatusFile(store):
            raise error
        assert read_status(store)["state"] == state
    assert read_status(store)["attempt"] == 4


def test_a_heartbeat_is_written_while_nothing_happens(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "HEARTBEAT_S", 0.05)
    store, writes = open_store(uri), list[str]()
    with StatusFile(store):
        original = store.put

        def put(key: str, data: bytes) -> FileInfo:
            writes.append(key)
            return original(key, data)

        monkeypatch.setattr(store, "put", put)
        wait_until(lambda: len(writes) >= 3, "three heartbeats were written", 60)
    assert set(writes) == {"status.json"}


def test_a_killed_run_looks_dead_after_a_while_and_the_next_one_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", RUNNING, str(tmp_path)])
    try:
        wait_until(lambda: (tmp_path / "status.json").exists() or process.poll() is not None, "it runs", 120)
        with caplog.at_level("WARNING", "expo_ray"), StatusFile(store):
            pass
        assert f"says that it runs (on {os.uname().nodename}, process {process.pid})" in caplog.text
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    caplog.clear()
    data: dict[str, Any] = {**read_status(store), "state": "running", "heartbeat_s": 0.05}
    store.put("status.json", json.dumps(data).encode())
    time.sleep(MISSED * 0.05)
    assert not is_alive(read_status(store))
    with caplog.at_level("WARNING", "expo_ray"), StatusFile(store):
        pass
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("state", "age_s", "alive"),
    [("running", 10, True), ("running", 100, False), ("done", 1, False), ("running", None, False)],
)
def test_alive_is_what_has_said_so_of_late(state: str, age_s: float | None, alive: bool) -> None:
    updated = None if age_s is None else (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    assert is_alive({"state": state, "updated": updated, "heartbeat_s": 5.0}) is alive


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": 3, "attempt": "x", "updated": 7}'])
def test_a_status_that_makes_no_sense_does_not_stop_a_job(uri: str, text: str) -> None:
    store = open_store(uri)
    store.put("status.json", text.encode())
    with StatusFile(store) as status:
        assert status.attempt in {1, 2}
    assert read_status(store)["state"] == "done"
