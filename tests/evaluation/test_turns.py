"""Turns on GPUs: who is there when, with threads as a search has them. No Ray."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from expo_ray.evaluation.turns import Turn, Turns

STEPS = 6
ROUNDS = 3


class Machine:
    """A GPU that holds one model.

    Attributes:
        events: what started, ended and worked, in order.
    """

    def __init__(self) -> None:
        self.turns, self.events = Turns(), list[tuple[str, str]]()
        self.there: str = ""

    def turn(self, name: str) -> Turn:
        def start() -> None:
            assert not self.there
            self.there = name
            self.events.append(("start", name))

        def end() -> None:
            assert self.there == name
            self.there = ""
            self.events.append(("end", name))

        return Turn(self.turns, start=start, end=end)

    def work(self, name: str) -> None:
        assert self.there == name
        self.events.append(("work", name))


def test_a_round_is_answered_whole_and_each_reward_model_is_loaded_once_for_it() -> None:
    machine = Machine()
    engine, *rewards = (machine.turn(name) for name in ("engine", "first", "second"))
    arrived = threading.Barrier(STEPS)
    one_at_a_time = threading.Semaphore(1)

    def evaluate(step: int) -> None:
        arrived.wait()
        with engine:
            arrived.wait()  # all of a round join the turn before any answers
            with one_at_a_time:
                machine.work("engine")
        for turn, name in zip(rewards, ("first", "second"), strict=True):
            with turn:
                arrived.wait()
                machine.work(name)

    with ThreadPoolExecutor(STEPS) as threads:
        for _ in range(ROUNDS):
            list(threads.map(evaluate, range(STEPS)))
    assert [event for event in machine.events if event[0] == "work"] == [
        ("work", name) for _ in range(ROUNDS) for name in ("engine", "first", "second") for _ in range(STEPS)
    ]
    assert [name for kind, name in machine.events if kind == "start"] == [
        "engine",
        "first",
        "second",
    ] * ROUNDS


def test_a_model_that_is_asked_again_before_another_stays() -> None:
    machine = Machine()
    engine = machine.turn("engine")
    for _ in range(3):
        with engine:
            machine.work("engine")
    assert machine.events == [("start", "engine")] + [("work", "engine")] * 3


def test_one_that_does_not_start_leaves_the_room_to_others() -> None:
    machine, failures = Machine(), []

    def fail() -> None:
        failures.append("engine")
        raise RuntimeError("no engine")

    engine, first = (
        Turn(machine.turns, start=fail, end=lambda: failures.append("ended")),
        machine.turn("first"),
    )
    with first:
        machine.work("first")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no engine"), engine:
            pass
        with first:
            machine.work("first")
    assert failures == ["engine"] * 2  # and what never started is not ended
    assert machine.there == "first"
