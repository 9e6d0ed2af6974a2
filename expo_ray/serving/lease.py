"""Share an engine, which holds the weights of one step at a time, among requests for different steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress

from expo_ray.errors import ArithmeticFault, ExpoError
from expo_ray.extrapolation.step import Step

# Newcomers for the step in the engine are admitted until another step has waited this many times the length of a swap.
PATIENCE_IN_SWAPS = 4.0
SHORTEST_PATIENCE_S = 0.5
# Most steps that wait at the same time, beside those that are expected; it bounds the swaps before any request's turn.
MOST_WAITING = 16
# Steps whose weights cannot be computed are remembered, by groups.
_MOST_REFUSED = 1024


class Busy(ExpoError):
    """Too many different steps are asked for at once."""


class Lease:
    """Requests for the step in the engine share it; another step waits until they have drained.

    Then there is one swap, and all requests that wait for the new step are admitted together. The step that has waited longest
    is next, so that of n steps each has its turn after at most n - 1 others. When `MOST_WAITING` steps wait, a new one replaces
    the one that came last: a burst of alphas loses its tail, and does not keep out those who come after it.

    If the weights of a step cannot be computed, its requests fail, and the engine is swapped anew for the next step. After any
    other failed swap no request is admitted again, as the weights in the engine are unknown. All methods belong to one event loop.

    Args:
        swap: puts the weights of a step into the engine, which is idle while it runs.
        held: the step whose weights the engine holds already, if any.
        expected: steps that may always wait.
        make_ahead: is told, while the engine works, which step it is likely to be swapped to next.
    """

    def __init__(
        self,
        swap: Callable[[Step], Awaitable[None]],
        held: Step | None,
        expected: Collection[Step] = (),
        make_ahead: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._swap, self._held, self._expected = swap, held, frozenset(expected)
        self._make_ahead = make_ahead
        self._hint: Step | None = None
        self._made_ahead: Step | None = None
        self._too_far: dict[object, tuple[float, ArithmeticFault]] = {}
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
        """Error after which the engine must not be used any more; None while it may."""
        return self._failure

    @asynccontextmanager
    async def on(self, step: Step) -> AsyncIterator[None]:
        """Use the engine with the weights of `step`.

        Raises:
            ArithmeticFault: if the weights of `step` cannot be computed.
            Busy: if too many other steps wait.
            Exception: the one that a swap failed with, now or earlier.
        """
        await self._enter(step)
        try:
            yield
        finally:
            self._active -= 1
            self._advance()

    def expect(self, step: Step) -> None:
        """Take a client's hint that it will ask for `step` after the one in the engine. A wrong hint costs time alone."""
        self._hint = step
        self._look_ahead()

    def _look_ahead(self) -> None:
        """While the engine works, name the step that is next: the one that has waited longest, or else the hint."""
        step = next(iter(self._waiting), self._hint)
        if not self._active or step is None or step in {self._held, self._made_ahead}:
            return
        with suppress(ArithmeticFault):
            self._check_refused(step)
            self._made_ahead = step
            self._make_ahead(step)

    async def _enter(self, step: Step) -> None:
        if self._failure:
            raise self._failure
        self._check_refused(step)
        if step == self.held and not self._closed():
            self._active += 1
            return
        self._make_room(step)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(step, []).append(turn)
        self._since.setdefault(step, time.monotonic())
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(step, turn)
            raise

    def _check_refused(self, step: Step) -> None:
        """Refuse a step past one whose weights overflowed, without a swap.

        An element that overflows at one alpha does so at every larger one, as |dpo + alpha delta| is convex in alpha.
        """
        alpha, fault = self._too_far.get(step.factors, (step.alpha, None))
        if fault is not None and step.alpha >= alpha:
            raise ArithmeticFault(str(fault))

    def _make_room(self, step: Step) -> None:
        if step in self._waiting or step in self._expected:
            return
        others = [waiting for waiting in self._waiting if waiting not in self._expected]
        if len(others) >= MOST_WAITING:
            error = Busy(
                f"more than {MOST_WAITING} different alphas are asked for at once, each of which has to be loaded; ask again "
                f"later, or list the alpha under `alphas` of the pair"
            )
            self._turn_away(others[-1], error)

    def _turn_away(self, step: Step, error: Exception) -> None:
        self._since.pop(step, None)
        for turn in self._waiting.pop(step, []):
            if not turn.done():
                turn.set_exception(error)

    def _leave(self, step: Step, turn: asyncio.Future[None]) -> None:
        """Forget an abandoned request, whether or not its turn had come."""
        if turn.done() and not turn.cancelled() and not turn.exception():
            self._active -= 1
        elif turn in self._waiting.get(step, []):
            self._waiting[step].remove(turn)
            if not self._waiting[step]:
                del self._waiting[step], self._since[step]
        self._advance()

    def _closed(self) -> bool:
        """True if another step has waited so long that newcomers queue behind it."""
        patience_s = max(SHORTEST_PATIENCE_S, PATIENCE_IN_SWAPS * self._swap_s)
        oldest = min(self._since.values(), default=None)
        return oldest is not None and time.monotonic() - oldest > patience_s

    def _advance(self) -> None:
        """Once the engine is free, give it to the step that has waited longest."""
        if self._active or self._swapping or self._failure or not self._waiting:
            self._look_ahead()
            return
        step = next(iter(self._waiting))
        if step == self._held:
            self._admit(step)
        else:
            self._swapping = asyncio.get_running_loop().create_task(
                self._change(step), name=f"swap to {step}"
            )

    async def _change(self, step: Step) -> None:
        started, fault = time.monotonic(), None
        try:
            await self._swap(step)
        except ArithmeticFault as error:
            fault = error
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else RuntimeError("the swap was cut short"))
            return
        finally:
            self._swapping = None
        self._made_ahead = None  # the swap has used it up
        if fault is None:
            self._held, self._swap_s = step, time.monotonic() - started
            self._admit(step)
        else:
            self._held = None  # some tensors may be the new ones
            self._refuse(step, fault)
        self._advance()  # all who wanted it may have gone

    def _admit(self, step: Step) -> None:
        for turn in self._waiting.pop(step, []):
            if not turn.done():
                turn.set_result(None)
                self._active += 1
        self._since.pop(step, None)

    def _refuse(self, step: Step, fault: ArithmeticFault) -> None:
        if step.alpha > 0 and len(self._too_far) < _MOST_REFUSED:
            self._too_far[step.factors] = step.alpha, fault
        self._turn_away(step, fault)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for step in list(self._waiting):
            self._turn_away(step, error)
