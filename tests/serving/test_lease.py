"""The lease without an engine and without waiting: a clock that moves when work is done, and events that end it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import pytest

from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.step import Step
from expo_ray.serving import lease as lease_module
from expo_ray.serving.lease import MOST_WAITING, SHORTEST_PATIENCE_S, Busy, Lease

# Longer than the loop needs for all that a few tasks can do without each other.
TURNS = 100


class Clock:
    """Takes the place of the module `time` in the lease."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


class Engine:
    """Stands for an engine: knows what it holds, and notices a swap while it is in use."""

    def __init__(self, held: float | None = 0.0, expected: Collection[Step] = ()) -> None:
        self.held = held
        self.swaps: list[float] = []
        self.served: list[float] = []
        self.users = 0
        self.swapping = False
        self.fail_on: float | None = None
        self.may_swap = asyncio.Event()
        self.may_swap.set()
        self.made_ahead: list[float] = []
        self.lease = Lease(
            self._swap,
            None if held is None else Step(held),
            expected,
            lambda step: self.made_ahead.append(step.alpha),
        )

    async def _swap(self, step: Step) -> None:
        alpha = step.alpha
        assert self.users == 0
        self.held, self.swapping = None, True
        await asyncio.sleep(0)
        await self.may_swap.wait()
        self.swapping = False
        assert self.users == 0
        if alpha == self.fail_on:
            raise RuntimeError("the weights are wrong")
        if alpha > 1e38:
            raise ArithmeticFault(f"overflow at {alpha}")
        self.held = alpha
        self.swaps.append(alpha)

    async def request(self, alpha: float, until: asyncio.Event | None = None, turns: int = 1) -> None:
        """Use the engine at `alpha` for some turns of the loop, or until an event."""
        async with self.lease.on(Step(alpha)):
            self.users += 1
            try:
                assert self.held == alpha
                await (until.wait() if until else pass_turns(turns))
                assert self.held == alpha
                self.served.append(alpha)
            finally:
                self.users -= 1


async def pass_turns(turns: int = TURNS) -> None:
    """Let the other tasks do what they can."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def wait_for(is_reached: Callable[[], bool]) -> None:
    """Let the other tasks work until a state is reached; `run` ends a test that never reaches it."""
    while not is_reached():
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_requests_for_the_alpha_in_the_engine_share_it_without_a_swap() -> None:
    async def scenario() -> None:
        engine, done = Engine(), asyncio.Event()
        requests = [asyncio.create_task(engine.request(0.0, done)) for _ in range(20)]
        await wait_for(lambda: engine.users == 20)
        done.set()
        await asyncio.gather(*requests)
        assert engine.swaps == []

    run(scenario())


def test_an_engine_that_holds_nothing_known_is_swapped_first() -> None:
    async def scenario() -> None:
        engine = Engine(held=None)
        await engine.request(0.0)
        assert engine.swaps == [0.0]

    run(scenario())


def test_another_alpha_waits_until_the_engine_has_drained_and_all_that_want_it_share_one_swap() -> None:
    async def scenario() -> None:
        engine, done = Engine(), asyncio.Event()
        first = asyncio.create_task(engine.request(0.0, done))
        await wait_for(lambda: engine.users == 1)
        others = [asyncio.create_task(engine.request(0.5)) for _ in range(10)]
        await pass_turns()
        assert engine.swaps == []
        done.set()
        await asyncio.gather(first, *others)
        assert engine.swaps == [0.5]
        assert engine.served == [0.0] + [0.5] * 10

    run(scenario())


def test_many_alphas_at_once_are_all_served_and_each_swap_serves_all_that_waited() -> None:
    async def scenario() -> None:
        engine = Engine()
        alphas = [index / 8 for index in range(16)]
        await asyncio.gather(*(engine.request(alpha) for _ in range(8) for alpha in alphas))
        assert len(engine.served) == 128
        assert len(engine.swaps) == 15  # all but alpha 0, which was there

    run(scenario())


def test_a_stream_of_requests_for_one_alpha_does_not_starve_another(clock: Clock) -> None:
    async def scenario() -> None:
        engine = Engine()
        other_served = asyncio.Event()

        async def stream(first_turn: int) -> None:
            """Two of them overlap, so that the engine is never idle."""
            await pass_turns(first_turn)
            while not other_served.is_set():
                await engine.request(0.0, turns=3)
                clock.now += SHORTEST_PATIENCE_S / 10

        async def other() -> None:
            await wait_for(lambda: engine.users == 2)
            await engine.request(0.5)
            other_served.set()

        await asyncio.gather(stream(0), stream(1), other())
        assert 0.5 in engine.served
        assert engine.served[0] == engine.served[-1] == 0.0  # the stream goes on afterwards
        assert engine.swaps == [0.5, 0.0]

    run(scenario())


def test_streams_take_turns(clock: Clock) -> None:
    async def scenario() -> None:
        engine = Engine()

        async def stream(alpha: float) -> None:
            for _ in range(20):
                await engine.request(alpha)
                clock.now += SHORTEST_PATIENCE_S / 10

        await asyncio.gather(*(stream(alpha) for alpha in (0.0, 0.5, 1.0) for _ in range(4)))
        assert len(engine.served) == 240
        assert (
            6 < len(engine.swaps) < 60
        )  # turns: neither one stream after the other, nor a swap for each request

    run(scenario())


def test_abandoned_requests_leave_nothing_behind() -> None:
    async def scenario() -> None:
        engine = Engine()
        running = asyncio.create_task(engine.request(0.0, asyncio.Event()))
        await wait_for(lambda: engine.users == 1)
        waiting = [asyncio.create_task(engine.request(0.5)) for _ in range(3)]
        await pass_turns()
        for task in [running, *waiting[:2]]:
            task.cancel()
        await asyncio.gather(running, *waiting, return_exceptions=True)
        assert engine.served == [0.5]
        engine.may_swap.clear()
        in_swap = asyncio.create_task(engine.request(1.0))
        await wait_for(lambda: engine.swapping)
        in_swap.cancel()
        await pass_turns()
        engine.may_swap.set()
        await engine.request(0.5)
        await engine.request(1.0)
        assert engine.served == [0.5, 0.5, 1.0]
        assert engine.users == 0

    run(scenario())


def test_after_a_failed_swap_no_request_is_admitted() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.fail_on = 0.5
        waiting = [engine.request(alpha) for alpha in (0.5, 0.5, 1.0)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in errors] == ["the weights are wrong"] * 3
        with pytest.raises(RuntimeError, match="the weights are wrong"):
            await engine.request(0.0)
        assert engine.served == []
        assert engine.lease.held is None
        assert engine.lease.failure is not None

    run(scenario())


def test_an_alpha_that_overflows_costs_its_own_requests_and_no_engine() -> None:
    async def scenario() -> None:
        engine = Engine()
        for alpha in (3e40, 1e308, 3e40):
            with pytest.raises(ArithmeticFault):
                await engine.request(alpha)
            assert engine.lease.failure is None
        # what it held was lost with the first attempt
        await engine.request(0.0)
        assert engine.swaps == [0.0]
        # the larger one was refused without an attempt, and so was the second request
        assert engine.held == 0.0

    run(scenario())


def test_requests_that_wait_beside_an_alpha_that_overflows_are_served() -> None:
    async def scenario() -> None:
        engine = Engine()
        bad = [asyncio.create_task(engine.request(3e40)) for _ in range(3)]
        good = [asyncio.create_task(engine.request(alpha)) for alpha in (0.5, 1.0)]
        await asyncio.gather(*good)
        faults = await asyncio.gather(*bad, return_exceptions=True)
        assert all(isinstance(fault, ArithmeticFault) for fault in faults)
        assert engine.users == 0

    run(scenario())


def test_a_burst_of_alphas_loses_its_tail_and_keeps_no_later_request_out() -> None:
    async def scenario() -> None:
        engine = Engine(expected=[Step(0.25)])
        burst = [asyncio.create_task(engine.request(1 + index / 1000)) for index in range(500)]
        await asyncio.sleep(0)
        await engine.request(0.25)
        before = len(engine.swaps)
        await engine.request(7.5)
        assert before <= MOST_WAITING + 2
        results = await asyncio.gather(*burst, return_exceptions=True)
        refused = [result for result in results if isinstance(result, Busy)]
        assert len(refused) + MOST_WAITING + 1 >= 500
        assert engine.lease.failure is None

    run(scenario())


def test_an_expected_alpha_is_never_turned_away() -> None:
    async def scenario() -> None:
        expected = [Step(float(alpha)) for alpha in range(1, 60)]
        engine = Engine(expected=expected)
        await asyncio.gather(*(engine.request(step.alpha) for step in expected))
        assert len(engine.served) == len(expected)

    run(scenario())


def test_the_step_that_waits_is_made_ahead_while_the_engine_works_and_before_any_hint() -> None:
    async def scenario() -> None:
        engine, done = Engine(), asyncio.Event()
        running = asyncio.create_task(engine.request(0.0, done))
        await wait_for(lambda: engine.users == 1)
        engine.lease.expect(Step(2.0))
        engine.lease.expect(Step(2.0))
        assert engine.made_ahead == [2.0]
        others = [asyncio.create_task(engine.request(alpha)) for alpha in (0.5, 0.5, 1.0)]
        await pass_turns()
        assert engine.made_ahead == [2.0, 0.5]
        done.set()
        await asyncio.gather(running, *others)
        # each swap uses up what was made: the next in the queue follows, then the hint, which still stands
        assert engine.swaps == [0.5, 1.0]
        assert engine.made_ahead == [2.0, 0.5, 1.0, 2.0]

    run(scenario())


def test_nothing_is_made_ahead_for_an_idle_engine_nor_for_a_step_that_it_holds_or_that_overflows() -> None:
    async def scenario() -> None:
        engine, done = Engine(), asyncio.Event()
        with pytest.raises(ArithmeticFault):
            await engine.request(3e40)
        await engine.request(0.0)
        engine.lease.expect(Step(0.5))
        await pass_turns()
        assert engine.made_ahead == []
        running = asyncio.create_task(engine.request(0.0, done))
        await wait_for(lambda: engine.users == 1)
        engine.lease.expect(Step(0.0))
        engine.lease.expect(Step(1e308))
        assert engine.made_ahead == []
        engine.lease.expect(Step(0.5))
        assert engine.made_ahead == [0.5]
        done.set()
        await running

    run(scenario())


def test_a_wrong_hint_changes_no_answer_and_no_swap() -> None:
    async def scenario() -> None:
        engine = Engine()
        for alpha in (0.5, 1.0, 0.5):
            async with engine.lease.on(Step(alpha)):
                engine.lease.expect(Step(8.0))
        assert engine.swaps == [0.5, 1.0, 0.5]

    run(scenario())
