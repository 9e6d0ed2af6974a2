"""How far the responses or rewards of an evaluation are, in rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expo_ray import progress
from expo_ray.progress import clock
from expo_ray.storage import Store


class RowProgress(progress.Progress):
    """Told what has been answered or scored, by any thread.

    Args:
        stage: `respond` or `reward`.
        rows: what is counted, such as `responses`.
        status: store that receives `status.json`; None for none.
        quiet: show nothing.
    """

    def __init__(self, stage: str, rows: str, status: Store | None = None, *, quiet: bool = False) -> None:
        super().__init__(stage, status, quiet=quiet)
        self._rows = rows
        self._all = self._done = self._kept = self._tokens = 0

    def begin(self, rows: int, kept: int = 0) -> None:
        """Start the clock on `rows` rows, beside `kept` ones that are there already; called again, on so many more."""
        with self._lock:
            if not self._all:
                self._open_bar(rows, self._rows)
            self._all += rows
            self._kept += kept
            if self._bar is not None:
                self._bar.total = self._all

    def add(self, tokens: int, rows: int = 1) -> None:
        """Count finished rows and their tokens."""
        with self._lock:
            self._done += rows
            self._tokens += tokens
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self._tokens_per_s():.0f} tokens/s", refresh=False)
                self._bar.update(rows)

    def finish(self, state: str, failures: Sequence[str] = ()) -> None:
        """Write the last `status.json`, after which it stays as it is."""
        self._write_last(state, {"failed": list(failures)})

    @property
    def line(self) -> str:
        with self._lock:
            if not self._all:
                return ""
            left = self._seconds_left()
            return f"{self._done}/{self._all} {self._rows}, {self._tokens_per_s():.0f} tokens/s" + (
                "" if left is None else f", {clock(left)} left"
            )

    def counts(self) -> Mapping[str, Any]:
        with self._lock:
            left = self._seconds_left()
            return {
                self._rows: {"done": self._done, "all": self._all, "kept": self._kept},
                "tokens": self._tokens,
                "tokens_per_s": round(self._tokens_per_s(), 1),
                "seconds": round(self.seconds(), 1),
                "seconds_left": None if left is None else round(left, 1),
            }

    def _tokens_per_s(self) -> float:
        return self._tokens / max(self.seconds(), 1e-9)

    def _seconds_left(self) -> float | None:
        return self.seconds() * (self._all - self._done) / self._done if self._done else None
