"""Machines made of Linux namespaces, with a Ray across them: one can lose its power or its cable and the others live on."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from examples.local_s3 import SeaweedFS
from tests.support.paths import ROOT
from tests.support.ray_cluster import (
    OBJECT_STORE_BYTES,
    Process,
    RayBox,
    shipped_settings,
    wait_until,
    working,
)
from tests.support.slow_proxy import SlowProxy

# Exists in the namespaces only: this machine has no interface in it.
_NETWORK = "10.77.0"
_STORE = f"{_NETWORK}.1"
_HEAD_PORT = 6379
_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "hostname")
_ISOLATED = ("--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc")
# The first process of a machine adopts orphans; as it ignores their end, the kernel lets none stay behind as a zombie.
_REAPER = "exec env --ignore-signal=CHLD sleep infinity"
_CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """What this machine lacks to make others of itself; empty if nothing."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not found (iproute2, util-linux)"
    links = "ip link add name a type veth peer name b && ip link add name c type bridge && mount -t tmpfs none /dev/shm"
    tried = subprocess.run(
        ["unshare", *_ISOLATED, "sh", "-c", links], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip()


class Switch:
    """What the machines' cables lead to; the store's address is here."""

    def __init__(self, box: RayBox) -> None:
        self.pid = box.run(*_mortal("unshare", "--net", "sleep", "infinity")).pid
        wait_until(lambda: _command_of(self.pid) == ["sleep", "infinity"], "the switch is there")
        self.ip("link add name br0 type bridge")
        self.ip(f"addr add {_STORE}/24 dev br0")
        self.ip("link set br0 up")

    def ip(self, words: str) -> None:
        _run("nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", *words.split())

    def listener(self) -> socket.socket:
        """A socket of this process that listens at the store's address."""
        made: list[socket.socket] = []

        def listen() -> None:  # a thread may change its network, and a socket keeps the one it was made in
            with open(f"/proc/{self.pid}/ns/net", "rb") as network:
                assert ctypes.CDLL(None).setns(network.fileno(), _CLONE_NEWNET) == 0
            made.append(socket.create_server((_STORE, 0)))

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        return made[0]


class Machine:
    """Its own network, processes, mounts, name and shared memory; files are shared, but for Ray's folder.

    Attributes:
        ray: `ray start`, with all of this machine's Ray below it.
        lost: it has no power or no cable.
    """

    def __init__(self, box: RayBox, switch: Switch, number: int, ray_folder: Path) -> None:
        self.lost = False
        self._box, self._switch, self._port = box, switch, f"p{number}"
        self.address = f"{_NETWORK}.{10 + number}"
        prepare = f"hostname host{number}; mount -t tmpfs none /dev/shm; mount -t tmpfs none {ray_folder}"
        outside = box.run(*_mortal("unshare", *_ISOLATED, "sh", "-ec", f"{prepare}; {_REAPER}"))
        wait_until(lambda: self._init(outside) or not outside.running, "the machine is there")
        assert outside.running, outside.stderr
        self.init = self._init(outside)
        cable = f"link add name eth0 netns {self.init} type veth peer name {self._port} netns {switch.pid}"
        _run("ip", *cable.split())
        switch.ip(f"link set {self._port} master br0 up")
        for words in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            _run(*self._inside("ip", *words.split()))
        _run(
            *self._inside("ip", *["route", "add", "default", "dev", "eth0"])
        )  # Ray looks there for its own address

    @staticmethod
    def _init(outside: Process) -> int:
        """The first process, once it has nothing left to prepare."""
        inside = [child.pid for child in outside.descendants()]
        return inside[0] if inside and _command_of(inside[0]) == ["sleep", "infinity"] else 0

    def _inside(self, *command: str) -> list[str]:
        return [
            "nsenter",
            f"--target={self.init}",
            *("--net", "--pid", "--mount", "--uts", "--ipc"),
            "--",
            *command,
        ]

    def run(self, *command: str, **environment: str) -> Process:
        """Start a program on this machine."""
        return self._box.run(*self._inside(*command), **environment)

    def start_ray(self, num_cpus: int, *flags: str) -> None:
        """Begin `ray start`; see `wait_for_ray`."""
        words = [
            f"--node-ip-address={self.address}",
            f"--num-cpus={num_cpus}",
            f"--resources={json.dumps({'shard_io': num_cpus} if num_cpus else {})}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--block",
        ]
        self.ray = self.run(
            "ray", "start", *words, *flags, PYTHONPATH=""
        )  # workers get the code from the driver

    def wait_for_ray(self) -> None:
        wait_until(lambda: "runtime started" in self.ray.stdout or not self.ray.running, "Ray is up")
        assert self.ray.running, self.ray.stderr

    @property
    def shards(self) -> int:
        """How many are under way here."""
        return len(working(self.ray.pid))

    def kill(self) -> None:
        """End every process at once."""
        self.lost = True
        os.kill(self.init, signal.SIGKILL)

    def cut(self) -> None:
        """Let nothing in or out any more, without a word to anyone."""
        self.lost = True
        self._switch.ip(f"link set {self._port} down")

    def heal(self) -> None:
        """Plug the cable in again; Ray may have given the machine up meanwhile."""
        self._switch.ip(f"link set {self._port} up")

    def runs(self, part: str) -> bool:
        """True if a process of this machine has `part` in its command."""
        return any(part in " ".join(_command_of(child.pid)) for child in self.ray.descendants())


class Machines(RayBox):
    """A head without CPUs, where jobs are started, and two workers with room for two shards each.

    Args:
        environment: of everything that runs on them, beside what they need.

    Attributes:
        ray_folder: of Ray; each machine has its own, in memory.
        way: from the machines to the S3 server; there is no other.
        workers: those that are not lost.
    """

    def __init__(self, server: SeaweedFS, **environment: str) -> None:
        nobody = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
        super().__init__(
            **server.environment, **nobody, **shipped_settings(), RAY_AUTH_MODE="token", **environment
        )
        self.environment["RAY_AUTH_TOKEN_PATH"] = str(self.folder / "token")
        self.ray_folder = self.folder / "ray"
        self.ray_folder.mkdir()
        self._server = server
        self._all: list[Machine] = []
        self._open = ExitStack()

    def _start(self) -> None:
        self._switch = Switch(self)
        self.way = self._open.enter_context(SlowProxy(self._server.endpoint, self._switch.listener()))
        self.environment["AWS_ENDPOINT_URL"] = self.way.endpoint
        self.make_cluster()

    def make_cluster(self) -> None:
        """Start a head, after another one was lost, and two workers."""
        for machine in self._all:
            if not machine.lost:
                machine.kill()
        self.environment.pop("RAY_ADDRESS", None)
        self.head = self._machine()
        self.head.start_ray(0, "--head", f"--port={_HEAD_PORT}", f"--temp-dir={self.ray_folder}")
        self.head.wait_for_ray()
        self.environment["RAY_ADDRESS"] = f"{self.head.address}:{_HEAD_PORT}"
        self.replace_lost()

    def replace_lost(self) -> None:
        """Put new workers in the place of lost ones."""
        living = [machine for machine in self._all if not machine.lost and machine is not self.head]
        new = [self._machine() for _ in range(2 - len(living))]
        for machine in new:
            machine.start_ray(2, f"--address={self.environment['RAY_ADDRESS']}")
        for machine in new:
            machine.wait_for_ray()
        self.workers = living + new

    def _machine(self) -> Machine:
        machine = Machine(self, self._switch, len(self._all) + 1, self.ray_folder)
        self._all.append(machine)
        return machine

    def job(self, file: Path, *arguments: str, **environment: str) -> Process:
        """Start `python jobs/extrapolate.py FILE` on the head."""
        script = str(ROOT / "jobs" / "extrapolate.py")
        return self.head.run(sys.executable, script, str(file), *arguments, **environment)

    def submit(self, folder: Path, *words: str, flags: Sequence[str] = ()) -> Process:
        """Start `ray job submit FLAGS --working-dir FOLDER -- python WORDS` on the head."""
        command = ("ray", "job", "submit", *flags, "--working-dir", str(folder), "--", "python", *words)
        return self.head.run(*command, RAY_ADDRESS="http://127.0.0.1:8265", PYTHONPATH="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self._all:
            with contextlib.suppress(ProcessLookupError):
                machine.kill()
        super().__exit__(kind, error, trace)
        self._open.close()


def _mortal(*command: str) -> list[str]:
    """It ends with this process, however that ends."""
    return ["setpriv", "--pdeathsig=KILL", *command]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _command_of(pid: int) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(pid).cmdline())
    return []


@pytest.fixture(scope="module")
def machines(s3_server: SeaweedFS) -> Iterator[Machines]:
    """A cluster of whole machines."""
    if reason := why_not():
        pytest.skip(f"no machines can be made here: {reason}")
    with Machines(s3_server) as made:
        yield made
