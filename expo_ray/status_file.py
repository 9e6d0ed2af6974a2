"""`status.json` of an output: what a job is at, with a heartbeat, so that one that is dead can be told from one that is slow."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from expo_ray import __version__
from expo_ray.errors import ExpoError, NotFound
from expo_ray.interrupt import begin_clean_up
from expo_ray.storage import Store
from expo_ray.text import message
from expo_ray.untrusted import parse_json

log = logging.getLogger("expo_ray")

STATUS = "status.json"
HEARTBEAT_S = 5.0
# Heartbeats that a job that lives may miss: its store may keep it waiting.
MISSED = 12
_MOST_BYTES = 16 << 20


class StatusFile:
    """`status.json` of one run of a job: rewritten every few seconds while used as a context manager, by a thread of its own.

    Args:
        store: of the job's output.

    Attributes:
        run: id of this run.
        attempt: number of this run among those that have written this file.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.run, self.attempt = uuid.uuid4().hex[:12], 1
        self._started = _now()
        self._stage, self._counts = "start", _no_counts
        self._failed: list[str] = []
        self._published: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)

    def show(self, stage: str, counts: Callable[[], Mapping[str, Any]]) -> None:
        """Show a stage of the work from now on, with what `counts` returns at each heartbeat."""
        self._stage, self._counts = stage, counts

    def finish(self, failures: Iterable[str], published: int | None = None) -> None:
        """Take note of the end of a stage: what failed, and the number of models that are complete, if it makes any."""
        self._failed += [name for name in failures if name not in self._failed]
        self._published = self._published if published is None else published

    def __enter__(self) -> Self:
        self.attempt = self._last_attempt() + 1
        self._write("running")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            begin_clean_up()
        self._stop.set()
        self._thread.join()  # a last `running` must not overtake the final state on its way to the store
        if error is None:
            self._write("failed" if self._failed else "done", ended=True)
        else:
            self._write("failed" if isinstance(error, Exception) else "interrupted")

    def _last_attempt(self) -> int:
        """Number of the last run; 0 if there is none. One that seems to run now is named in the log."""
        try:
            data = read_status(self._store)
        except ExpoError:
            return 0
        if is_alive(data):
            log.warning(
                "another job has written %s/%s %s, and says that it runs (on %s); end one of them if both do: each does the other's "
                "work as well",
                self._store.uri, STATUS, message(str(data.get("updated"))), message(str(data.get("driver"))),
            )  # fmt: skip
        attempt = data.get("attempt")
        return attempt if isinstance(attempt, int) else 1

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self._write("running")

    def _write(self, state: str, *, ended: bool = False) -> None:
        published = {} if self._published is None else {"published": self._published}
        data = {
            "state": state,
            "stage": self._stage,
            **self._counts(),
            **(published | {"failed": [message(name) for name in self._failed]} if ended else {}),
            "run": self.run,
            "attempt": self.attempt,
            "driver": f"{socket.gethostname()}, process {os.getpid()}",
            "version": __version__,
            "started": self._started,
            "updated": _now(),
            "heartbeat_s": HEARTBEAT_S,
        }
        try:
            self._store.put(STATUS, (json.dumps(data, indent=1) + "\n").encode())
        except ExpoError as error:  # a lost status line must not cost the job
            log.warning("%s could not be written: %s", STATUS, error)


def read_status(store: Store) -> Mapping[str, Any]:
    """Read the status of an output.

    Raises:
        NotFound: if no job has written there.
        ExpoError: if it cannot be read.
    """
    data = parse_json(
        store.read(STATUS, most_bytes=_MOST_BYTES),
        f"{store.uri}/{STATUS}",
        most_bytes=_MOST_BYTES,
        remedy="delete it; the next job writes it anew",
    )
    if not isinstance(data, dict):
        raise NotFound(f"{store.uri}/{STATUS}: not the status of a job; delete it")
    return data


def seconds_since(data: Mapping[str, Any]) -> float | None:
    """Seconds since a status was written; None if it does not say."""
    try:
        written = datetime.fromisoformat(str(data.get("updated")))
        return (datetime.now(UTC) - written).total_seconds()
    except (ValueError, TypeError):
        return None


def is_alive(data: Mapping[str, Any]) -> bool:
    """True if a status says that its job runs, and has said so of late."""
    since, beat = seconds_since(data), data.get("heartbeat_s")
    period = beat if isinstance(beat, int | float) else HEARTBEAT_S
    return data.get("state") == "running" and since is not None and since < MISSED * period


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _no_counts() -> Mapping[str, Any]:
    return {}
