"""Turns of engines and reward models on GPUs that do not hold all of them at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turns:
    """Lets one of several models be on the same GPUs at a time.

    A turn lasts while anybody works with the model, and all who wait for the same model join it: the answers of a whole round share
    one start of the engines. The model whose users have waited longest follows, and the one before is ended first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._inside = 0
        # Whose turn it is, or was last: it stays where it is until another wants the room.
        self._holder: Turn | None = None

    def enter(self, turn: Turn) -> None:
        """Wait for the turn of a model, and start it if it does not run. Nobody else gets in meanwhile.

        Raises:
            Exception: whatever starting it raises; the room is then empty.
        """
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._is_next(turn))
                self._give_room(turn)
                self._inside += 1
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def leave(self) -> None:
        """End the part of one user in the turn that is on."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def _is_next(self, turn: Turn) -> bool:
        if self._inside or self._holder in self._waiting:
            return turn is self._holder
        return turn is self._waiting[0]

    def _give_room(self, turn: Turn) -> None:
        if turn is self._holder:
            return
        if self._holder is not None:
            self._holder.end()
            self._holder = None
        turn.start()
        self._holder = turn


def _nothing() -> None:
    """Do nothing: a reward model starts when it is asked."""


class Turn:
    """The turn of one model: a `with` block, of any number of threads at the same time, in which it may be used.

    Args:
        start: called when its turn begins.
        end: called before the turn of another begins.
    """

    def __init__(
        self, turns: Turns, *, end: Callable[[], None], start: Callable[[], None] = _nothing
    ) -> None:
        self._turns, self.start, self.end = turns, start, end

    def __enter__(self) -> None:
        self._turns.enter(self)

    def __exit__(self, *_: object) -> None:
        self._turns.leave()
