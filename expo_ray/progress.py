"""Progress of some work: a bar on a terminal, a line every few seconds in a log, counts for `status.json`."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from expo_ray.interrupt import begin_clean_up, raise_if_interrupted
from expo_ray.status_file import StatusFile

log = logging.getLogger("expo_ray")

LINE_PERIOD_S = 5.0
BAR_PERIOD_S = 0.2
# Below this, only headers may have been written, which say nothing of the pace.
_TELLING_BYTES = 1_000_000


@dataclass(frozen=True)
class Counts:
    """The state of some work at one moment: what is done, and what is expected, which may still grow.

    Attributes:
        kept: rows of an earlier run, which are not asked for or scored again.
    """

    shards: int = 0
    shards_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    rows: int = 0
    rows_done: int = 0
    kept: int = 0
    tokens_done: int = 0


class Counters:
    """Counts of work that any thread may raise; nothing is shown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """The counts of this moment."""
        with self._lock:
            return self._counts

    def expect(self, *, shards: int = 0, bytes: int = 0, rows: int = 0, kept: int = 0) -> None:
        """Expect this much work, beside what was expected before."""
        with self._lock:
            old = self._counts
            self._counts = replace(
                old,
                shards=old.shards + shards,
                bytes=old.bytes + bytes,
                rows=old.rows + rows,
                kept=old.kept + kept,
            )

    def add(self, *, shards: int = 0, bytes: int = 0, rows: int = 0, tokens: int = 0) -> None:
        """Count work that is done; bytes of a shard that is written again are taken back with a negative number.

        Raises:
            KeyboardInterrupt: if a signal should have ended the work.
        """
        raise_if_interrupted()
        with self._lock:
            old = self._counts
            self._counts = replace(
                old,
                shards_done=old.shards_done + shards,
                bytes_done=old.bytes_done + bytes,
                rows_done=old.rows_done + rows,
                tokens_done=old.tokens_done + tokens,
            )


class Progress(Counters):
    """Counts of work that a thread shows, while used as a context manager: as a bar on a terminal, else as a line in the log.

    Args:
        stage: name of the work on the bar and in `status.json`.
        status: shows the counts as well; None for none.
        rows: name of the rows that are counted, such as `responses`; without one, shards and bytes are counted.
        quiet: show nothing.

    Attributes:
        rewards: the rewards of a search, counted beside its responses.
    """

    def __init__(
        self, stage: str, status: StatusFile | None = None, *, rows: str = "", quiet: bool = False
    ) -> None:
        super().__init__()
        self.stage, self.rewards = stage, Counters()
        self._status, self._rows, self._quiet = status, rows, quiet
        self._pairs: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._started: float | None = None
        self._bar: tqdm[None] | None = None

    def expect(self, *, shards: int = 0, bytes: int = 0, rows: int = 0, kept: int = 0) -> None:
        """Expect this much work, beside what was expected before; the clock starts at the first."""
        super().expect(shards=shards, bytes=bytes, rows=rows, kept=kept)
        with self._lock:
            if self._started is None and (shards or bytes or rows):
                self._started = time.monotonic()

    def note(self, pair: str, text: str) -> None:
        """Report what a pair is at from now on, or its result, in the log and in `status.json`."""
        log.info("%s: %s", pair, text)
        with self._lock:
            self._pairs[pair] = text

    def finish(self, failures: Iterable[str] = (), *, published: int | None = None) -> None:
        """Tell `status.json` how the work has ended.

        Args:
            failures: names of what failed.
            published: number of models that are complete; None where none is made.
        """
        if self._status is not None:
            self._status.finish(failures, published)

    @property
    def line(self) -> str:
        """The line of a log; empty before the work has begun."""
        counts, seconds = self.counts, self._seconds()
        if not (counts.rows if self._rows else counts.shards):
            return ""
        if self._rows:
            parts = [
                f"{counts.rows_done}/{counts.rows} {self._rows}",
                f"{per_second(counts.tokens_done, seconds):.0f} tokens/s",
            ]
        else:
            parts = [
                f"{counts.shards_done}/{counts.shards} shards",
                f"{size_text(counts.bytes_done)} of {size_text(counts.bytes)}",
                f"{size_text(per_second(counts.bytes_done, seconds))}/s",
            ]
        rewards, left = self.rewards.counts, self._seconds_left(counts, seconds)
        parts += [] if left is None else [f"{clock(left)} left"]
        parts += [f"{rewards.rows_done}/{rewards.rows} rewards"] if rewards.rows else []
        return ", ".join(parts)

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.show(self.stage, self._status_counts)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            begin_clean_up()
        self._stop.set()
        self._thread.join()
        self._log_line()

    def _status_counts(self) -> dict[str, Any]:
        counts, seconds = self.counts, self._seconds()
        left = self._seconds_left(counts, seconds)
        data: dict[str, Any] = {}
        if self._rows:
            data[self._rows] = {"done": counts.rows_done, "all": counts.rows, "kept": counts.kept}
            data["tokens"] = counts.tokens_done
            data["tokens_per_s"] = round(per_second(counts.tokens_done, seconds), 1)
        else:
            data["shards"] = {"done": counts.shards_done, "all": counts.shards}
            data["bytes"] = {"done": counts.bytes_done, "all": counts.bytes}
        data["seconds"] = round(seconds, 1)
        data["seconds_left"] = None if left is None else round(left, 1)
        with self._lock:
            pairs = dict(self._pairs)
        if pairs:
            rewards = self.rewards.counts
            data |= {"rewards": {"done": rewards.rows_done, "all": rewards.rows}, "pairs": pairs}
        return data

    def _seconds(self) -> float:
        return 0.0 if self._started is None else time.monotonic() - self._started

    def _seconds_left(self, counts: Counts, seconds: float) -> float | None:
        """Time that the rest takes at the pace so far; None while that says nothing. A search's later rungs are not known yet."""
        if self._rows:
            done, expected, least = counts.rows_done, counts.rows, 1
        else:
            done, expected, least = counts.bytes_done, counts.bytes, _TELLING_BYTES
        return seconds * (expected - done) / done if done >= least else None

    def _show(self) -> None:
        """Refresh the bar often, and the line every few seconds, until the end."""
        on_terminal = not self._quiet and sys.stderr.isatty()
        next_line = time.monotonic() + LINE_PERIOD_S
        with ExitStack() as stack:
            while not self._stop.wait(BAR_PERIOD_S if on_terminal else LINE_PERIOD_S):
                if on_terminal:
                    self._move_bar(stack)
                if time.monotonic() >= next_line:
                    next_line = time.monotonic() + LINE_PERIOD_S
                    self._log_line()
            if on_terminal:
                self._move_bar(stack)

    def _move_bar(self, stack: ExitStack) -> None:
        """Bring the bar to the counts of this moment; it is opened, and closed by `stack`, once there is work."""
        counts = self.counts
        done, expected = (counts.rows_done, counts.rows) if self._rows else (counts.bytes_done, counts.bytes)
        if self._bar is None:
            if not expected:
                return
            bar = tqdm(total=expected, unit=self._rows or "B", unit_scale=not self._rows, desc=self.stage)
            self._bar = stack.enter_context(bar)
            stack.enter_context(logging_redirect_tqdm())
        self._bar.total = expected
        if self._rows:
            speed = per_second(counts.tokens_done, self._seconds())
            self._bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        else:
            self._bar.set_postfix_str(f"{counts.shards_done}/{counts.shards} shards", refresh=False)
        self._bar.update(done - self._bar.n)

    def _log_line(self) -> None:
        if self._bar is None and not self._quiet and (line := self.line):
            log.info("%s", line)


def per_second(count: float, seconds: float) -> float:
    """The pace of `count` things in `seconds`; 0 before the clock has started."""
    return count / seconds if seconds else 0.0


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
