"""How fast a process asks a store, and how long it waits for one: slower when the store says so, for minutes, not seconds.

All threads of a process share the pace of a store. A cluster's processes find their shares without talking to each other, as TCP
connections do: each halves its rate when it is refused, and adds a little with every second that it is not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# A store that has answered before is asked again for this long: AWS takes minutes to divide a bucket that is asked too much.
PATIENCE_S = 300.0
# Longest pause that a `Retry-After` can ask for.
LONGEST_PAUSE_S = 300.0
# Requests a second: what a process keeps to itself under any refusal, and what it adds in a second without one.
LEAST_RATE = 0.5
RATE_STEP = 2.0
# Refusals this close together are about the same burst and halve the rate once.
_EPISODE_S = 0.5
# So long without a refusal, and the pace is free again.
_FORGET_S = 120.0
_LATELY_S = 5.0
_MEASURED = 256

# Set while a job is being cancelled.
_hurry = threading.Event()


class Pace:
    """Turns for the requests of this process to one store: additive increase, multiplicative decrease of their rate.

    Attributes:
        rate: requests a second; None while the store has refused none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rate: float | None = None
        self._next_turn = self._paused_until = self._last_refusal = 0.0
        self._answers: deque[float] = deque(maxlen=_MEASURED)
        self._has_answered = False

    @property
    def patience_s(self) -> float:
        """Seconds that a request is repeated for: none for a store that never answered, as its address may be wrong."""
        return PATIENCE_S if self._has_answered and not _hurry.is_set() else 0.0

    def wait_for_turn(self) -> float:
        """Wait until a request may begin; returns the time at which it does, by `time.monotonic`."""
        while True:
            with self._lock:
                now = time.monotonic()
                turn = max(now, self._paused_until, self._next_turn)
                if turn <= now or _hurry.is_set():
                    self._next_turn = now + (1 / self.rate if self.rate else 0)
                    return now
            pause(min(turn - now, 1.0))

    def answered(self, begun: float) -> None:
        """Take note that the store did what was asked; a rate that was cut grows."""
        self._has_answered = True
        self._answers.append(time.monotonic())
        if self.rate is None:
            return
        with self._lock:
            if self.rate is not None and begun - self._last_refusal > _FORGET_S:
                self.rate = None
            elif self.rate is not None:
                self.rate += RATE_STEP / self.rate  # `rate` answers a second add one step

    def refused(self, begun: float, retry_after_s: float = 0.0) -> None:
        """Slow down, as the store said that it is asked too much.

        Args:
            begun: when the request began. One that began before the last refusal says nothing about the rate since.
            retry_after_s: nothing is asked for so long.
        """
        self._has_answered = True
        with self._lock:
            now = time.monotonic()
            self._paused_until = max(self._paused_until, now + min(retry_after_s, LONGEST_PAUSE_S))
            if begun >= self._last_refusal + _EPISODE_S or self.rate is None:
                self.rate = max(LEAST_RATE, (self.rate or self._measured(now)) / 2)
                self._last_refusal = now

    def in_refusal(self) -> bool:
        """True if a refusal was met a moment ago, so that the store need not be asked how long to wait."""
        with self._lock:
            now = time.monotonic()
            return self._paused_until > now or now - self._last_refusal < _EPISODE_S

    def _measured(self, now: float) -> float:
        """Answers in each second of late."""
        recent = [at for at in list(self._answers) if now - at < _LATELY_S]
        return len(recent) / max(now - recent[0], 0.1) if recent else 0.0


@cache
def pace_of(store: str) -> Pace:
    """Return the pace of this process at a store, named by its endpoint and, on S3, the bucket."""
    return Pace()


def pause(seconds: float) -> None:
    """Sleep, unless a job is being cancelled."""
    _hurry.wait(seconds)


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Cut short all waiting for stores inside the block: what is under way is being cancelled, and should end soon."""
    _hurry.set()
    try:
        yield
    finally:
        _hurry.clear()
