"""Problems that are collected over several steps and reported at once."""

from __future__ import annotations

import pickle

import pytest

from expo_ray.errors import Collected, JobError, PairError, Problems, in_one_line


def fail(error: Exception) -> int:
    raise error


def test_problems_of_all_blocks_are_raised_together() -> None:
    problems, done = Collected(), []
    with problems.catching():
        fail(JobError("first"))
        done.append("after the first problem")
    with problems.catching():
        done.append("a block without a problem")
    with problems.catching():
        fail(Problems([PairError("second"), PairError("third")]))
    with pytest.raises(Problems) as raised:
        problems.raise_any()
    assert [str(error) for error in raised.value.problems] == ["first", "second", "third"]
    assert done == ["a block without a problem"]


def test_nested_blocks_keep_steps_apart_that_need_the_same_value() -> None:
    problems = Collected()
    with problems.catching():
        number = 1
        with problems.catching():
            fail(JobError(f"{number} is too small"))
        with problems.catching():
            fail(JobError(f"{number} is odd"))
    assert list(map(str, problems.problems)) == ["1 is too small", "1 is odd"]


def test_without_problems_the_values_are_there() -> None:
    problems = Collected()
    with problems.catching():
        number = 1
    problems.raise_any()
    assert number == 1


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), KeyboardInterrupt()])
def test_other_exceptions_pass_through(error: BaseException) -> None:
    problems = Collected()
    with pytest.raises(type(error)), problems.catching():
        raise error
    assert not problems.problems


def test_problems_survive_pickling_and_fit_on_one_line() -> None:
    error = pickle.loads(pickle.dumps(Problems([JobError("one"), PairError("two")])))
    assert [type(inner) for inner in error.problems] == [JobError, PairError]
    assert in_one_line(error) == "one; two"


def test_a_problem_of_several_blocks_is_reported_once() -> None:
    problems = Collected()
    for _ in range(3):
        with problems.catching():
            fail(JobError("a package is not installed"))
    assert list(map(str, problems.problems)) == ["a package is not installed"]
