"""The Ray cluster that a job runs on: an existing one, or a private one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import ray
import ray._private.utils
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import get_num_cpus, read_ray_address

import expo_ray
from expo_ray.errors import JobError
from expo_ray.on_ray.shared_paths import refuse_unshared
from expo_ray.storage.local_writer import free_bytes
from expo_ray.text import shown

log = logging.getLogger("expo_ray")

# Custom resource that bounds the shards under way on one node: what its network and disk can carry, not its cores.
SHARD_IO = "shard_io"

# Ray itself tries an address where nobody answers for a quarter of an hour.
CONNECT_TIMEOUT_S = 5.0
# A busy cluster may take its time to answer.
_ANSWER_TIMEOUT_S = 20.0
# A method that every Ray head serves, and no other gRPC server knows.
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
# Where it is "0", 127.0.0.1 stays 127.0.0.1 in every process of Ray that reads it.
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Least room for Ray's sockets and logs, and the longest path of their folder: names of sockets have at most 107 bytes.
_TEMPORARY_BYTES = 64 << 20
_TEMPORARY_LENGTH = 30
# Only plans pass through it; weights never do.
OBJECT_STORE_BYTES = 256 << 20


@contextlib.contextmanager
def cluster(places: Mapping[str, str] | None = None) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS or started on this machine with `ray start`, or start a private one.

    Args:
        places: see `refuse_unshared`.

    Raises:
        JobError: if RAY_ADDRESS names a cluster that cannot be reached.
        Problems: if one of `places` is a local path, and the cluster has a machine without it.
    """
    with contextlib.ExitStack() as stack:
        if address := _find_address():
            stack.callback(ray.shutdown)
            _connect(address)
            log.info("connected to the Ray cluster at %s", address)
            refuse_unshared(places or {})
        else:
            _start_private(stack)
        yield


def is_private() -> bool:
    """True if the connected Ray is one that this process has started on this machine: nobody else uses it, and it does not grow."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


@contextlib.contextmanager
def known_cluster() -> Iterator[bool]:
    """Connect to the cluster that `cluster` would join, without starting one; yields whether there is one.

    Raises:
        JobError: if RAY_ADDRESS names a cluster that cannot be reached.
    """
    address = _find_address()
    try:
        if address:
            _connect(address)
        yield bool(address)
    finally:
        if address:
            ray.shutdown()


def _connect(address: str) -> None:
    _init_twice(
        f"the Ray at {address} cannot be joined, tried twice ({{reason}}); look whether RAY_ADDRESS, its token (RAY_AUTH_MODE) and the "
        "versions of Ray and Python are those of the cluster and this machine is one of its nodes, or unset RAY_ADDRESS to work on "
        "this machine alone; a machine that is too busy may do it later",
        address=address,
        logging_level=logging.WARNING,
        runtime_env=_code(),
    )


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep `ray.init` from replacing our handler of SIGTERM, which cleans up, with its own."""
    theirs = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _find_address() -> str | None:
    """Address of the cluster to use, or None to start a private one. A Ray that another program started for itself is ignored."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    if "://" in named:
        raise JobError(
            f"RAY_ADDRESS is {named}, from where jobs are submitted; run `ray job submit --working-dir . -- python "
            "jobs/extrapolate.py JOB.yaml`, or unset RAY_ADDRESS to work on this machine"
        )
    if named not in {"", "auto"}:
        if not _answers(named):
            raise JobError(
                f"RAY_ADDRESS is {named}, and nobody answers there; correct it, or unset it to work on this machine"
            )
        if not _is_ray(named):
            raise JobError(
                f"RAY_ADDRESS is {named}, and what answers there is not the head of a Ray cluster; give the address that `ray start "
                "--head` prints (its port is usually 6379), or unset it to work on this machine"
            )
        return named
    # The file that `ray start` leaves on its machine; `ray stop` removes it, a killed Ray does not.
    started_here: str | None = read_ray_address()
    if started_here and not (_answers(started_here) and _is_ray(started_here)):
        log.info(
            "the Ray cluster at %s, started here with `ray start`, is gone; starting a local one",
            started_here,
        )
        return None
    return started_here


def _code() -> dict[str, Any]:
    """Runtime environment that brings this very code to the workers; a submitted job has brought it already."""
    return {} if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ else {"py_modules": [expo_ray]}


def _answers(address: str) -> bool:
    try:
        place = urlsplit(f"//{address}")
        socket.create_connection((place.hostname or "", place.port or 0), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _is_ray(address: str) -> bool:
    """Check that the head of a Ray cluster answers, in seconds where Ray itself waits for minutes.

    A cluster that wants a token or TLS counts, although it refuses to answer.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}:
        return True
    # A proxy for the internet is no way to a cluster.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_ALIVE)
        try:
            ask(b"", timeout=_ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code()
            return code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
    return True


def _find_temporary_folder() -> str:
    """Find a folder with room for Ray's session, and with a path so short that names of sockets below it are allowed.

    Raises:
        JobError: if there is none.
    """
    candidates = ("/tmp", "/var/tmp", os.environ.get("TMPDIR") or "/tmp", os.path.expanduser("~"))
    for folder in candidates:
        if len(folder) <= _TEMPORARY_LENGTH and os.access(folder, os.W_OK | os.X_OK):
            free = free_bytes(folder)
            if free is None or free >= _TEMPORARY_BYTES:
                return folder
    raise JobError(
        f"Ray needs a folder with {_TEMPORARY_BYTES >> 20} MiB for its session, and none of {', '.join(dict.fromkeys(candidates))} is "
        f"writable and has them; free space, or set TMPDIR to one whose path has at most {_TEMPORARY_LENGTH} characters"
    )


def _start_private(stack: contextlib.ExitStack) -> None:
    """Start a Ray that nobody else can reach: it listens on loopback only, and its token is readable by this user only."""
    temporary = tempfile.TemporaryDirectory(
        prefix="expo-ray-", dir=_find_temporary_folder(), ignore_cleanup_errors=True
    )
    folder = stack.enter_context(temporary)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray leaves one in ~/.ray
        os.environ["RAY_AUTH_TOKEN_PATH"] = f"{folder}/token"
        stack.callback(os.environ.pop, "RAY_AUTH_TOKEN_PATH")
        Path(folder, "token").write_text(secrets.token_hex(32))
    # An engine takes minutes to start, and Serve would complain of it every half a minute.
    os.environ.setdefault("RAY_SERVE_SLOW_STARTUP_WARNING_S", "600")
    # As Ray sets it on macOS. Otherwise it replaces 127.0.0.1 by the address of the network card and opens every port to the
    # network. This process has read the variable already; those that it starts read it anew, among them vLLM's engine
    # core on a GPU, a spawned child that connects as a driver and would look for the cluster behind the network card.
    ray_constants.ENABLE_RAY_CLUSTER = False
    if _LOOPBACK_ONLY not in os.environ:
        os.environ[_LOOPBACK_ONLY] = "0"
        stack.callback(os.environ.pop, _LOOPBACK_ONLY)
    cpus = max(1, int(get_num_cpus(override_docker_cpu_warning=True)))
    stack.callback(ray.shutdown)
    _init_twice(
        "Ray did not start on this machine, twice ({reason}); end other work and try again, or set RAY_ADDRESS to a cluster",
        address="local",
        num_cpus=cpus,
        resources={SHARD_IO: cpus},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    log.info("started a local Ray of %d CPUs", cpus)


def _init_twice(failure: str, **options: Any) -> None:
    """Start or join Ray, and try once more if it fails: on a busy machine it does not always do so within its own time limit.

    Args:
        failure: text of the error, with a place for the `reason`.

    Raises:
        JobError: if it fails again.
    """
    try:
        with _signals_left_alone():
            ray.init(**options)
        return
    except Exception as error:
        log.warning("Ray did not start (%s); trying once more", _first_line(error))
        ray.shutdown()
    try:
        with _signals_left_alone():
            ray.init(**options)
    except Exception as error:
        ray.shutdown()
        raise JobError(failure.format(reason=_first_line(error))) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__)
