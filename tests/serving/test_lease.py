"""The lease without an engine: a swap is a pause, and a request notes which alpha it met."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

import pytest

from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.step import Step
from expo_ray.serving import lease as lease_module
from expo_ray.serving.lease import MOST_WAITING, Busy, Lease

STEP_S = 0.002


class Engine:
    """Stands for an engine: knows what it holds, and would notice a swap while it is in use."""

    def __init__(self, held: float | None = 0.0, expected: Collection[Step] = ()) -> None:
        self.held = held
        self.swaps: list[float] = []
        self.served: list[float] = []
        self.users = 0
        self.fail_on: float | None = None
        self.lease = Lease(self._swap, None if held is None else Step(held), expected)

    async def _swap(self, step: Step) -> None:
        alpha = step.alpha
        assert self.users == 0
        self.held = None
        await asyncio.sleep(STEP_S)
        assert self.users == 0
        if alpha == self.fail_on:
            raise RuntimeError("the weights are wrong")
        if alpha > 1e38:
            raise ArithmeticFault(f"overflow at {alpha}")
        self.held = alpha
        self.swaps.append(alpha)

    async def request(self, alpha: float, seconds: float = STEP_S) -> None:
        async with self.lease.on(Step(alpha)):
            self.users += 1
            try:
                assert self.held == alpha
                await asyncio.sleep(seconds)
                assert self.held == alpha
                self.served.append(alpha)
            finally:
                self.users -= 1


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_requests_for_the_alpha_in_the_engine_share_it_without_a_swap() -> None:
    async def scenario() -> None:
        engine = Engine()
        most = 0

        async def watch() -> None:
            nonlocal most
            while not most:  # all are let in at the same turn of the loop, before any of them is done
                await asyncio.sleep(0)
                most = engine.users

        await asyncio.gather(*(engine.request(0.0) for _ in range(20)), watch())
        assert most == 20
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
        engine = Engine()
        first = asyncio.create_task(engine.request(0.0, 10 * STEP_S))
        await asyncio.sleep(0)
        await asyncio.gather(*(engine.request(0.5) for _ in range(10)))
        assert first.done()
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


def test_a_stream_of_requests_for_one_alpha_does_not_starve_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "SHORTEST_PATIENCE_S", 10 * STEP_S)

    async def scenario() -> None:
        engine = Engine()
        other_served = asyncio.Event()

        async def stream() -> None:  # always two in flight: the engine is never idle by itself
            while not other_served.is_set():
                await engine.request(0.0, 3 * STEP_S)

        async def other() -> None:
            await asyncio.sleep(5 * STEP_S)
            await engine.request(0.5)
            other_served.set()

        async def late_stream() -> None:
            await asyncio.sleep(1.5 * STEP_S)
            await stream()

        await asyncio.gather(stream(), late_stream(), other())
        assert 0.5 in engine.served
        assert engine.swaps[-1:] == [0.0]  # and the stream goes on afterwards

    run(scenario())


def test_two_streams_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "SHORTEST_PATIENCE_S", 2 * STEP_S)

    async def scenario() -> None:
        engine = Engine()

        async def stream(alpha: float) -> None:
            for _ in range(20):
                await engine.request(alpha)

        await asyncio.gather(*(stream(alpha) for alpha in (0.0, 0.5, 1.0) for _ in range(4)))
        assert len(engine.served) == 240
        assert len(engine.swaps) < 120  # turns, not a swap for each request

    run(scenario())


def test_requests_that_are_given_up_leave_nothing_behind() -> None:
    async def scenario() -> None:
        engine = Engine()
        running = asyncio.create_task(engine.request(0.0, 5 * STEP_S))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(engine.request(0.5)) for _ in range(3)]
        await asyncio.sleep(STEP_S)
        for task in [running, *waiting[:2]]:
            task.cancel()
        await asyncio.gather(running, *waiting, return_exceptions=True)
        assert engine.served == [0.5]
        in_swap = asyncio.create_task(engine.request(1.0))
        await asyncio.sleep(STEP_S / 2)
        in_swap.cancel()
        await engine.request(0.5)
        await engine.request(1.0)
        assert engine.served == [0.5, 0.5, 1.0]
        assert engine.users == 0

    run(scenario())


def test_after_a_failed_swap_nobody_is_let_in_again() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.fail_on = 0.5
        waiting = [engine.request(alpha) for alpha in (0.5, 0.5, 1.0)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in found] == ["the weights are wrong"] * 3
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


def test_a_burst_of_alphas_costs_its_tail_and_not_who_comes_after_it() -> None:
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
