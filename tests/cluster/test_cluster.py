"""The Ray that a job runs on: an address that is none, a machine too busy to start one, signals meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import ray._private.utils

from expo_ray.errors import JobError
from expo_ray.on_ray import cluster as module
from expo_ray.on_ray.cluster import cluster
from tests.support.ray_cluster import free_port, wait_until


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where connections are taken and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def web_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def closes() -> Iterator[str]:
    """An address where every connection is taken and closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def close_all() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=close_all, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.mark.parametrize("what", ["silent", "web_server", "closes"])
def test_an_address_that_is_no_ray_is_refused_soon(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue(what))
    monkeypatch.setattr(module, "_ANSWER_TIMEOUT_S", 2.0)
    with pytest.raises(JobError, match=r"RAY_ADDRESS is .*not the head of a Ray cluster"), cluster():
        pass
    assert not ray.is_initialized()


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


@pytest.mark.usefixtures("local")
def test_a_start_that_fails_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def init(**options: object) -> None:
        calls.append(str(options["_temp_dir"]))
        if len(calls) == 1:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with cluster():
        assert len(calls) == 2


@pytest.mark.usefixtures("local")
def test_a_start_that_fails_twice_is_one_sentence_and_leaves_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[str] = []

    def init(**options: object) -> None:
        folders.append(str(options["_temp_dir"]))
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(JobError, match=r"did not start .* twice .*timed out during startup"), cluster():
        pass
    assert len(folders) == 2
    assert not any(Path(folder).exists() for folder in folders)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_a_cluster_that_is_joined_at_the_second_attempt_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def init(**options: object) -> None:
        calls.append(str(options["address"]))
        if len(calls) != 2:
            raise Exception("The current node timed out during startup.\nmore")  # as Ray raises it

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(module, "_find_address", lambda: "10.0.0.1:6379")
    with cluster():
        assert calls == ["10.0.0.1:6379"] * 2
    calls += calls
    with (
        pytest.raises(
            JobError, match=r"10\.0\.0\.1:6379 cannot be joined, tried twice \(The current node timed out"
        ),
        cluster(),
    ):
        pass


@pytest.mark.usefixtures("local")
def test_a_sigterm_while_ray_starts_is_ours_and_leaves_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    def init(**options: object) -> None:
        folders.append(str(options["_temp_dir"]))
        ray._private.utils.set_sigterm_handler(lambda *_: os._exit(15))  # as `ray.init` does
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), cluster():
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not Path(folders[0]).exists()


@pytest.mark.usefixtures("local")
def test_a_missing_folder_for_the_session_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 0)
    with pytest.raises(JobError, match="set TMPDIR"), cluster():
        pass


@pytest.mark.parametrize("token", ["", "a" * 64], ids=["open", "token"])
def test_the_head_of_a_cluster_is_recognised(tmp_path: Path, token: str) -> None:
    server = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    port = free_port()
    words = [str(server), f"--gcs_server_port={port}", "--config_list=e30=", f"--log_dir={tmp_path}"]
    words += ["--node-ip-address=127.0.0.1", "--session-name=test"]
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        words, env={**os.environ, **mode}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: module._answers(f"127.0.0.1:{port}"), "the head listens")
            assert module._is_ray(f"127.0.0.1:{port}")
        finally:
            process.kill()
