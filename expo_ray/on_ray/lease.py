"""Whose turn it is in an engine that holds the weights of one alpha at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from expo_ray.config import format_alpha

# Newcomers for the alpha in the engine are let in until another alpha has waited this many times as long as a swap takes.
PATIENCE_IN_SWAPS = 4.0
SHORTEST_PATIENCE_S = 0.5


class Lease:
    """Requests for the alpha in the engine share it; another alpha waits until they have drained.

    Then there is one swap, and all that wait for the new alpha are let in together. Alphas take turns by who has waited longest, so
    with n of them each comes up after at most n - 1 others. After a failed swap nobody is let in again: what the engine holds
    is unknown. All methods belong to one event loop.

    Args:
        swap: puts the weights of an alpha into the engine, which is idle while it runs.
        held: the alpha whose weights the engine holds already, if any.
    """

    def __init__(self, swap: Callable[[float], Awaitable[None]], held: float | None) -> None:
        self._swap, self._held = swap, held
        self._active = 0
        self._waiting: dict[float, list[asyncio.Future[None]]] = {}  # the alpha that has waited longest first
        self._since: dict[float, float] = {}
        self._swapping: asyncio.Task[None] | None = None
        self._swap_s = 0.0
        self._failure: Exception | None = None

    @property
    def held(self) -> float | None:
        """The alpha in the engine; None while it changes, or if it is unknown."""
        return None if self._swapping or self._failure else self._held

    @property
    def failure(self) -> Exception | None:
        """Why the engine must not be used any more."""
        return self._failure

    @asynccontextmanager
    async def on(self, alpha: float) -> AsyncIterator[None]:
        """Use the engine with the weights of `alpha`.

        Raises:
            Exception: the one that a swap failed with, now or earlier.
        """
        await self._enter(alpha)
        try:
            yield
        finally:
            self._active -= 1
            self._advance()

    async def _enter(self, alpha: float) -> None:
        if self._failure:
            raise self._failure
        if alpha == self.held and not self._closed():
            self._active += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(alpha, []).append(turn)
        self._since.setdefault(alpha, time.monotonic())
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(alpha, turn)
            raise

    def _leave(self, alpha: float, turn: asyncio.Future[None]) -> None:
        """Forget a request that was given up, whether or not its turn had come."""
        if turn.done() and not turn.cancelled() and not turn.exception():
            self._active -= 1
        elif turn in self._waiting.get(alpha, []):
            self._waiting[alpha].remove(turn)
            if not self._waiting[alpha]:
                del self._waiting[alpha], self._since[alpha]
        self._advance()

    def _closed(self) -> bool:
        """Whether another alpha has waited so long that it is due."""
        patience_s = max(SHORTEST_PATIENCE_S, PATIENCE_IN_SWAPS * self._swap_s)
        oldest = min(self._since.values(), default=None)
        return oldest is not None and time.monotonic() - oldest > patience_s

    def _advance(self) -> None:
        """Give the engine to who has waited longest, once it is free."""
        if self._active or self._swapping or self._failure or not self._waiting:
            return
        alpha = next(iter(self._waiting))
        if alpha == self._held:
            self._admit(alpha)
        else:
            self._swapping = asyncio.get_running_loop().create_task(
                self._change(alpha), name=f"swap to {format_alpha(alpha)}"
            )

    async def _change(self, alpha: float) -> None:
        started = time.monotonic()
        try:
            await self._swap(alpha)
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else RuntimeError("the swap was cut short"))
            return
        finally:
            self._swapping = None
        self._held, self._swap_s = alpha, time.monotonic() - started
        self._admit(alpha)
        self._advance()  # all who wanted it may have gone

    def _admit(self, alpha: float) -> None:
        for turn in self._waiting.pop(alpha, []):
            if not turn.done():
                turn.set_result(None)
                self._active += 1
        self._since.pop(alpha, None)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for turn in [turn for turns in self._waiting.values() for turn in turns]:
            if not turn.done():
                turn.set_exception(error)
        self._waiting.clear()
        self._since.clear()
