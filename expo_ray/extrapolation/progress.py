"""How far a job is: a bar on a terminal, a line every few seconds in a log, and `status.json` for operators."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from expo_ray.errors import ExpoError
from expo_ray.storage import Store

log = logging.getLogger("expo_ray")

LINE_PERIOD_S = 5.0
# Below this, only headers may have been written, which tell nothing of the speed.
_TELLING_BYTES = 1_000_000


@dataclass(frozen=True)
class Snapshot:
    """One moment of a job. `seconds_left` is None while next to nothing has been written."""

    state: str
    shards: int
    shards_done: int
    bytes: int
    bytes_done: int
    seconds: float
    seconds_left: float | None

    @property
    def line(self) -> str:
        left = "" if self.seconds_left is None else f", {clock(self.seconds_left)} left"
        return (
            f"{self.shards_done}/{self.shards} shards, {size_text(self.bytes_done)} of {size_text(self.bytes)}, "
            f"{size_text(self.bytes_done / max(self.seconds, 1e-9))}/s{left}"
        )


class Progress:
    """Told what has been written, by any thread; shows it from a thread of its own while used as a context manager.

    Args:
        status: store that receives `status.json`; None for none.
        quiet: show nothing.
    """

    def __init__(self, status: Store | None = None, *, quiet: bool = False) -> None:
        self._status, self._quiet = status, quiet
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._started = time.monotonic()
        self._shards = self._shards_done = self._bytes = self._bytes_done = 0
        self._bar: tqdm[None] | None = None
        self._shown = ExitStack()

    def begin(self, shards: int, size: int) -> None:
        """Start the clock on `shards` shards of `size` bytes in all."""
        with self._lock:
            self._started = time.monotonic()
            self._shards, self._bytes = shards, size
            if size and not self._quiet and sys.stderr.isatty():
                bar = tqdm(total=size, unit="B", unit_scale=True, desc="extrapolate", mininterval=0.2)
                self._bar = self._shown.enter_context(bar)
                self._shown.enter_context(logging_redirect_tqdm())

    def add(self, written: int) -> None:
        """Count bytes of output."""
        with self._lock:
            self._bytes_done += written
            if self._bar is not None:
                self._bar.update(written)

    def shard_done(self) -> None:
        with self._lock:
            self._shards_done += 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self._shards_done}/{self._shards} shards", refresh=False)

    def snapshot(self, state: str = "running") -> Snapshot:
        with self._lock:
            seconds = time.monotonic() - self._started
            done = self._bytes_done
            left = seconds * (self._bytes - done) / done if done > _TELLING_BYTES else None
            return Snapshot(state, self._shards, self._shards_done, self._bytes, done, seconds, left)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.finish("failed" if isinstance(error, Exception) else "interrupted")
        self._end()
        self._shown.close()
        if self._shards and self._bar is None and not self._quiet:
            log.info("%s", self.snapshot().line)

    def finish(self, state: str, published: int | None = None, failures: Sequence[str] = ()) -> None:
        """Write the last `status.json`, after which it stays as it is."""
        self._end()
        self._write_status(state, published, failures)

    def _end(self) -> None:
        """Stop showing; a last `running` must not overtake the final state on its way to the store."""
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        while not self._stop.wait(LINE_PERIOD_S):
            snapshot = self.snapshot()
            if snapshot.shards and self._bar is None and not self._quiet:
                log.info("%s", snapshot.line)
            self._write_status("running")

    def _write_status(self, state: str, published: int | None = None, failures: Sequence[str] = ()) -> None:
        if self._status is None:
            return
        snapshot = self.snapshot(state)
        data = {
            "state": state,
            "stage": "extrapolate",
            "shards": {"done": snapshot.shards_done, "all": snapshot.shards},
            "bytes": {"done": snapshot.bytes_done, "all": snapshot.bytes},
            "seconds": round(snapshot.seconds, 1),
            "seconds_left": None if snapshot.seconds_left is None else round(snapshot.seconds_left, 1),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if published is not None:
            data |= {"published": published, "failed": list(failures)}
        try:
            self._status.put("status.json", (json.dumps(data, indent=1) + "\n").encode())
        except ExpoError as error:  # a lost status line must not cost the job
            log.warning("status.json could not be written: %s", error)


def size_text(size: float) -> str:
    """`1.24 GB`: three digits, in the unit that suits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
