"""Whose turn it is in an engine that holds the weights of one step at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from expo_ray.extrapolation.step import Step

# Newcomers for the step in the engine are let in until another step has waited this many times as long as a swap takes.
PATIENCE_IN_SWAPS = 4.0
SHORTEST_PATIENCE_S = 0.5


class Lease:
    """Requests for the step in the engine share it; another step waits until they have drained.

    Then there is one swap, and all that wait for the new step are let in together. Steps take turns by who has waited longest, so
    with n of them each comes up after at most n - 1 others. After a failed swap nobody is let in again: what the engine holds
    is unknown. All methods belong to one event loop.

    Args:
        swap: puts the weights of an step into the engine, which is idle while it runs.
        held: the step whose weights the engine holds already, if any.
    """

    def __init__(self, swap: Callable[[Step], Awaitable[None]], held: Step | None) -> None:
        self._swap, self._held = swap, held
        self._active = 0
        self._waiting: dict[Step, list[asyncio.Future[None]]] = {}  # the step that has waited longest first
        self._since: dict[Step, float] = {}
        self._swapping: asyncio.Task[None] | None = None
        self._swap_s = 0.0
        self._failure: Exception | None = None

    @property
    def held(self) -> Step | None:
        """The step in the engine; None while it changes, or if it is unknown."""
        return None if self._swapping or self._failure else self._held

    @property
    def failure(self) -> Exception | None:
        """Why the engine must not be used any more."""
        return self._failure

    @asynccontextmanager
    async def on(self, step: Step) -> AsyncIterator[None]:
        """Use the engine with the weights of `step`.

        Raises:
            Exception: the one that a swap failed with, now or earlier.
        """
        await self._enter(step)
        try:
            yield
        finally:
            self._active -= 1
            self._advance()

    async def _enter(self, step: Step) -> None:
        if self._failure:
            raise self._failure
        if step == self.held and not self._closed():
            self._active += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(step, []).append(turn)
        self._since.setdefault(step, time.monotonic())
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(step, turn)
            raise

    def _leave(self, step: Step, turn: asyncio.Future[None]) -> None:
        """Forget a request that was given up, whether or not its turn had come."""
        if turn.done() and not turn.cancelled() and not turn.exception():
            self._active -= 1
        elif turn in self._waiting.get(step, []):
            self._waiting[step].remove(turn)
            if not self._waiting[step]:
                del self._waiting[step], self._since[step]
        self._advance()

    def _closed(self) -> bool:
        """Whether another step has waited so long that it is due."""
        patience_s = max(SHORTEST_PATIENCE_S, PATIENCE_IN_SWAPS * self._swap_s)
        oldest = min(self._since.values(), default=None)
        return oldest is not None and time.monotonic() - oldest > patience_s

    def _advance(self) -> None:
        """Give the engine to who has waited longest, once it is free."""
        if self._active or self._swapping or self._failure or not self._waiting:
            return
        step = next(iter(self._waiting))
        if step == self._held:
            self._admit(step)
        else:
            self._swapping = asyncio.get_running_loop().create_task(
                self._change(step), name=f"swap to {step}"
            )

    async def _change(self, step: Step) -> None:
        started = time.monotonic()
        try:
            await self._swap(step)
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else RuntimeError("the swap was cut short"))
            return
        finally:
            self._swapping = None
        self._held, self._swap_s = step, time.monotonic() - started
        self._admit(step)
        self._advance()  # all who wanted it may have gone

    def _admit(self, step: Step) -> None:
        for turn in self._waiting.pop(step, []):
            if not turn.done():
                turn.set_result(None)
                self._active += 1
        self._since.pop(step, None)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for turn in [turn for turns in self._waiting.values() for turn in turns]:
            if not turn.done():
                turn.set_exception(error)
        self._waiting.clear()
        self._since.clear()
