"""The adapters that an engine holds: each loaded once, kept while requests use it, and given up for another when room is short."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from expo_ray.extrapolation.step import Step
from expo_ray.serving.lease import MOST_WAITING, Busy


class ResidentAdapters:
    """Adapters of different steps in one engine, whose requests are answered together.

    A request for a step that is not there waits until it has been loaded. When `room` steps are there, the one that was not asked
    for longest goes first; one that requests use stays. All methods belong to one event loop.

    Args:
        load: loads the adapter of a step.
        unload: removes it, when no request uses it.
        room: steps that may be there at the same time.
        expected: steps that may always wait.
    """

    def __init__(
        self,
        load: Callable[[Step], Awaitable[None]],
        unload: Callable[[Step], Awaitable[None]],
        room: int,
        expected: Collection[Step] = (),
    ) -> None:
        self._load, self._unload, self._room, self._expected = load, unload, room, frozenset(expected)
        self._users: Counter[Step] = Counter()
        self._resident: dict[Step, None] = {}  # the step that was not asked for longest first
        self._loading: dict[Step, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def on(self, step: Step) -> AsyncIterator[None]:
        """Keep the adapter of `step` in the engine, loaded first where it is not there.

        Raises:
            Busy: if too many other steps wait.
            Exception: the one that `load` or `unload` raised; the next request loads anew.
        """
        self._users[step] += 1
        try:
            await self._enter(step)
            yield
        finally:
            self._users[step] -= 1
            if not self._users[step]:
                del self._users[step]
                self._freed.set()

    async def _enter(self, step: Step) -> None:
        if step in self._resident:
            self._resident[step] = self._resident.pop(step)
            return
        task = self._loading.get(step)
        if task is None:
            if step not in self._expected and len(self._loading) >= MOST_WAITING:
                raise Busy(
                    f"more than {MOST_WAITING} different alphas are asked for at once, each of which has to be loaded; ask again "
                    f"later, or list the alpha under `alphas` of the pair"
                )
            task = asyncio.get_running_loop().create_task(self._bring(step), name=f"adapter of {step}")
            self._loading[step] = task
        await asyncio.shield(task)  # the others who wait for it stay when one goes

    async def _bring(self, step: Step) -> None:
        try:
            async with self._one_at_a_time:
                while len(self._resident) >= self._room:
                    await self._make_room()
                await self._load(step)
                self._resident[step] = None
        finally:
            del self._loading[step]

    async def _make_room(self) -> None:
        idle = next((step for step in self._resident if step not in self._users), None)
        if idle is None:
            self._freed.clear()
            await self._freed.wait()
        else:
            del self._resident[idle]
            await self._unload(idle)
