"""How far some work is: a bar on a terminal, a line every few seconds in a log, and `status.json` for operators."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from expo_ray.errors import ExpoError
from expo_ray.storage import Store
from expo_ray.text import message

log = logging.getLogger("expo_ray")

LINE_PERIOD_S = 5.0


class Progress(ABC):
    """Counts work and shows it from a thread of its own while used as a context manager; a subclass says what is counted.

    Args:
        stage: name of the work on the bar and in `status.json`.
        status: store that receives `status.json`; None for none.
        quiet: show nothing.
    """

    def __init__(self, stage: str, status: Store | None = None, *, quiet: bool = False) -> None:
        self.stage = stage
        self._status, self._quiet = status, quiet
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._started = time.monotonic()
        self._bar: tqdm[None] | None = None
        self._shown = ExitStack()

    @property
    @abstractmethod
    def line(self) -> str:
        """What a log shows; empty before the work has begun."""

    @abstractmethod
    def counts(self) -> Mapping[str, Any]:
        """What `status.json` tells beside the state and the time."""

    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._started

    def _open_bar(self, total: int, unit: str) -> None:
        """Start the clock, and on a terminal show a bar; the caller holds the lock."""
        self._started = time.monotonic()
        if total and not self._quiet and sys.stderr.isatty():
            bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=self.stage, mininterval=0.2)
            self._bar = self._shown.enter_context(bar)
            self._shown.enter_context(logging_redirect_tqdm())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._write_last("failed" if isinstance(error, Exception) else "interrupted")
        self._end()
        self._shown.close()
        self._log_line()

    def _write_last(self, state: str, more: Mapping[str, Any] | None = None) -> None:
        """Write the last `status.json`, after which it stays as it is."""
        self._end()
        self._write_status(state, more or {})

    def _end(self) -> None:
        """Stop showing; a last `running` must not overtake the final state on its way to the store."""
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        while not self._stop.wait(LINE_PERIOD_S):
            self._log_line()
            self._write_status("running", {})

    def _log_line(self) -> None:
        if self._bar is None and not self._quiet and (line := self.line):
            log.info("%s", line)

    def _write_status(self, state: str, more: Mapping[str, Any]) -> None:
        if self._status is None:
            return
        data = {
            "state": state,
            "stage": self.stage,
            **self.counts(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            **{key: redacted(value) for key, value in more.items()},
        }
        try:
            self._status.put("status.json", (json.dumps(data, indent=1) + "\n").encode())
        except ExpoError as error:  # a lost status line must not cost the job
            log.warning("status.json could not be written: %s", error)


def redacted(value: Any) -> Any:
    """`value` with every text, alone or in a list, without secrets."""
    if isinstance(value, str):
        return message(value)
    return [redacted(inner) for inner in value] if isinstance(value, list) else value


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
