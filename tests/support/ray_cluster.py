"""Ray for tests, on loopback alone and with its own ports, folders and token; nobody else's Ray is met or touched."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
import yaml

from tests.support.paths import ROOT

PATIENCE_S = 600.0
OBJECT_STORE_BYTES = 100_000_000


def wait_until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: if it does not within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:.0f} s in vain until {what}")
        time.sleep(0.05)


def ended(process: psutil.Process) -> bool:
    """True if it has ended; a zombie counts, as its new parent, such as a container's first process, may collect it late."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Process:
    """A child in its own session, whose output goes to files."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        name = secrets.token_hex(4)
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """The exit status."""
        try:
            return self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running; stderr:\n{self.stderr}") from None

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.pid).children(recursive=True))
        return []

    def end(self) -> None:
        """End it and all it has started, those that outlive a SIGTERM with SIGKILL."""
        started = self.descendants()
        if self.running:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        if self.running:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: all(map(ended, started)), "all it started has ended", 5)
        for process in started:  # a frozen one, too
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class RayBox:
    """A folder, a token and an environment for one Ray, or for programs that start their own."""

    def __init__(self, **environment: str) -> None:
        # Ray's socket paths must stay short.
        self.folder = Path(tempfile.mkdtemp(prefix="xr-", dir="/tmp"))
        (self.folder / "home").mkdir()
        (self.folder / "token").write_text(secrets.token_hex(32))
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        self.environment = {
            **kept,
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Two streams of tests share the cores: threads that spin while they wait would take them from each other.
            "OMP_WAIT_POLICY": "PASSIVE",
            # What vLLM learns of an architecture takes a process that imports all of it; nothing of the user's is in there.
            "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
            **environment,
        }
        self._processes: list[Process] = []

    def run(self, *command: str, **environment: str) -> Process:
        """Start a program; it is ended with the box at the latest."""
        process = Process(list(command), {**self.environment, **environment}, self.folder)
        self._processes.append(process)
        return process

    def job(self, file: Path, *arguments: str, **environment: str) -> Process:
        """Start `python jobs/extrapolate.py FILE`."""
        script = str(ROOT / "jobs" / "extrapolate.py")
        return self.run(sys.executable, script, str(file), *arguments, **environment)

    def _start(self) -> None:
        """Start the processes that run in the box from the beginning."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.push(self)  # ends what has been started, should something fail
            self._start()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.end()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayHead(RayBox):
    """`ray start --head` with a dashboard, locked with a token as on a real cluster.

    Attributes:
        dashboard: where jobs are submitted.
        pid: all processes of this Ray are below it.
    """

    def __init__(self, num_cpus: int, **environment: str) -> None:
        super().__init__(**environment)
        self._num_cpus = num_cpus
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            # Without it, Ray puts the network card's address in the place of 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            **shipped_settings(),
        }

    def _start(self) -> None:
        port, dashboard_port = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        flags = {
            "port": port,
            "node-ip-address": "127.0.0.1",
            "num-cpus": self._num_cpus,
            "resources": json.dumps({"shard_io": self._num_cpus} if self._num_cpus else {}),
            "object-store-memory": OBJECT_STORE_BYTES,
            "include-dashboard": "true",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard_port,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "min-worker-port": 0,
            "max-worker-port": 0,
            "temp-dir": self.folder,
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        environment = {name: text for name, text in self.environment.items() if name != "PYTHONPATH"}
        head = Process(["ray", "start", "--head", "--block", *words], environment, self.folder)
        self._processes.append(head)
        self.pid = head.pid
        wait_until(lambda: "runtime started" in head.stdout or not head.running, "the head is up")
        assert head.running, head.stderr
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"

    def ask(self, method: str, path: str) -> dict[str, Any]:
        """Ask the job server directly; `ray job stop` and `status` ask the same, and take seconds to start."""
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        request = urllib.request.Request(self.dashboard + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            data: dict[str, Any] = json.load(answer)
        return data


def working(process: int) -> list[psutil.Process]:
    """The workers below a process that are in a shard just now."""
    children = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == ["ray::_run_shard"]:
                children.append(child)
    return children


def shipped_settings() -> dict[str, str]:
    """Ray's settings in our manifest, for every process of a cluster."""
    manifests = yaml.safe_load_all((ROOT / "cluster" / "rayjob.yaml").read_text())
    (data,) = (manifest["data"] for manifest in manifests if manifest["metadata"]["name"] == "expo-ray-env")
    return {name: text for name, text in data.items() if name.startswith("RAY_")}


@pytest.fixture(scope="session")
def ray_head(through_gateway: dict[str, str]) -> Iterator[RayHead]:
    """A running head of four CPUs with a dashboard."""
    with RayHead(4, **through_gateway) as head:
        yield head


@pytest.fixture
def ray_box(through_gateway: dict[str, str]) -> Iterator[RayBox]:
    """A box in which a job finds no Ray and starts its own."""
    with RayBox(**through_gateway) as box:
        yield box


@pytest.fixture(scope="session")
def ray_here(through_gateway: dict[str, str]) -> Iterator[None]:
    """A Ray of one CPU that this process is connected to."""
    import ray
    from ray._private import ray_constants

    with RayBox() as box, pytest.MonkeyPatch.context() as patch:
        for name, text in through_gateway.items():
            patch.setenv(name, text)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(box.folder / "token"))
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        ray.init(
            address="local",
            num_cpus=1,
            resources={"shard_io": 1},
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(box.folder),
        )
        try:
            yield
        finally:
            ray.shutdown()
