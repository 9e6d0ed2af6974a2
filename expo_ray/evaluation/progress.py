"""How far the responses or rewards of an evaluation are, in rows and tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from expo_ray import progress
from expo_ray.progress import clock
from expo_ray.storage import Store

log = logging.getLogger("expo_ray")


class RowCount(Protocol):
    """Is told what has been answered or scored, by any thread."""

    def begin(self, rows: int, kept: int = 0) -> None:
        """Expect `rows` rows, beside `kept` ones that are there already; called again, so many more."""

    def add(self, tokens: int, rows: int = 1) -> None:
        """Count finished rows and their tokens."""


class RowProgress(progress.Progress):
    """A `RowCount` that is shown.

    Args:
        stage: `respond`, `reward` or `search`.
        rows: what is counted, such as `responses`.
        status: store that receives `status.json`; None for none.
        quiet: show nothing.
    """

    def __init__(self, stage: str, rows: str, status: Store | None = None, *, quiet: bool = False) -> None:
        super().__init__(stage, status, quiet=quiet)
        self._rows = rows
        self._all = self._done = self._kept = self._tokens = 0

    def begin(self, rows: int, kept: int = 0) -> None:
        """Start the clock; see `RowCount`."""
        with self._lock:
            if not self._all:
                self._open_bar(rows, self._rows)
            self._all += rows
            self._kept += kept
            if self._bar is not None:
                self._bar.total = self._all

    def add(self, tokens: int, rows: int = 1) -> None:
        """See `RowCount`."""
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


class SearchProgress(RowProgress):
    """A search: its responses, and beside them its rewards and what each pair is at.

    The time left is that of the rungs begun: what they will ask for next, nobody knows.

    Attributes:
        rewards: counts the rewards.
    """

    def __init__(self, status: Store | None = None) -> None:
        super().__init__("search", "responses", status)
        self.rewards = _Rewards()
        self._pairs: dict[str, str] = {}

    def tell(self, pair: str, text: str) -> None:
        """What a pair is at from now on, or what came of it."""
        log.info("%s: %s", pair, text)
        with self._lock:
            self._pairs[pair] = text

    @property
    def line(self) -> str:
        scored = f", {self.rewards.done}/{self.rewards.all} rewards" if self.rewards.all else ""
        return super().line + scored

    def counts(self) -> Mapping[str, Any]:
        with self._lock:
            pairs = dict(self._pairs)
        return {
            **super().counts(),
            "rewards": {"done": self.rewards.done, "all": self.rewards.all},
            "pairs": pairs,
        }


class _Rewards:
    """A `RowCount` that only counts; its caller scores one batch at a time."""

    def __init__(self) -> None:
        self.all = self.done = 0

    def begin(self, rows: int, kept: int = 0) -> None:
        self.all += rows

    def add(self, tokens: int, rows: int = 1) -> None:
        self.done += rows
