"""What tasks of a job report to its driver: where they run, and that they move bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

T = TypeVar("T")

BEAT_S = 5.0
# Without an answer, a task begins.
_ANSWER_S = 30.0


class Reports:
    """What running attempts have said, and which attempts are not wanted; an actor beside the driver."""

    def __init__(self) -> None:
        self._nodes: dict[int, str] = {}
        self._moved: dict[int, float] = {}
        self._refused: set[str] = set()
        self._dropped: set[int] = set()

    def begin(self, attempt: int, node: str) -> bool:
        """Note where an attempt begins; false if it is not to."""
        if attempt in self._dropped or node in self._refused:
            return False
        self._nodes[attempt], self._moved[attempt] = node, time.monotonic()
        return True

    def moved(self, attempt: int) -> None:
        """Note that an attempt has moved bytes."""
        if attempt in self._nodes:
            self._moved[attempt] = time.monotonic()

    def read(self) -> dict[int, tuple[str, float]]:
        """The node of each attempt that has begun, and the seconds since it moved."""
        now = time.monotonic()
        return {attempt: (node, now - self._moved[attempt]) for attempt, node in self._nodes.items()}

    def forget(self, attempt: int) -> None:
        """Forget an attempt that has ended."""
        self._nodes.pop(attempt, None)
        self._moved.pop(attempt, None)

    def drop(self, attempt: int) -> None:
        """Forget an attempt, and refuse it should it only now begin."""
        self._dropped.add(attempt)
        self.forget(attempt)

    def refuse(self, nodes: set[str]) -> None:
        """Refuse attempts that begin on these nodes, and on no others."""
        self._refused = set(nodes)


@dataclass(frozen=True)
class Reporting:
    """Where an attempt reports, and its number."""

    reports: Any
    attempt: int


@dataclass(frozen=True)
class Reported(Generic[T]):
    """Result of an attempt, and the node that it ran on."""

    node: str
    result: T


class NotWanted(Exception):
    """An attempt began after it was given up, or on a node that gets no more."""


# Counts pages that the one task of this process has written.
_pages = 0


def note_progress() -> None:
    """Note that the task of this worker has moved bytes."""
    global _pages  # noqa: PLW0603
    _pages += 1


def run_reported(work: Callable[[], T], reporting: Reporting) -> Reported[T]:
    """Run `work` in a task, and report its beginning and that bytes move.

    Raises:
        NotWanted: if the driver does not want it here.
    """
    node = ray.get_runtime_context().get_node_id()
    with suppress(RayError):  # without reports, the work still counts
        if not ray.get(reporting.reports.begin.remote(reporting.attempt, node), timeout=_ANSWER_S):
            raise NotWanted
    with _beating(reporting):
        reported = Reported(node, work())
    # One that fails is forgotten by the driver, which asks first where it was.
    reporting.reports.forget.remote(reporting.attempt)
    return reported


@contextmanager
def _beating(reporting: Reporting) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        before = _pages
        while not ended.wait(BEAT_S):
            if _pages != before:
                before = _pages
                with suppress(Exception):
                    reporting.reports.moved.remote(reporting.attempt)

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
