"""A little of `tests/fuzz.py` in every run of the tests; `python -m tests.fuzz` goes on for as long as it is asked to."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import TARGETS, attempt


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**40))
def test_mutated_input_is_taken_or_refused(target: str, seed: int) -> None:
    attempt(target, seed)  # raises what is no ExpoError
