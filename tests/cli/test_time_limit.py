"""Code of others is interrupted in the thread that it runs in, and nothing else is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from expo_ray.time_limit import time_limit

_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


def _render() -> str:
    sandbox = pytest.importorskip("jinja2.sandbox")
    template = sandbox.ImmutableSandboxedEnvironment().from_string(_LOOPS)
    with time_limit(0.2):
        return str(template.render())


def test_a_template_without_end_is_interrupted() -> None:
    with pytest.raises(TimeoutError):
        _render()


def test_it_is_in_any_thread() -> None:
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(_render) for _ in range(2)]:
            with pytest.raises(TimeoutError):
                future.result()


def test_what_ends_in_time_is_left_alone() -> None:
    for _ in range(200):
        with time_limit(1):
            pass
    time.sleep(1.5)  # a limit that outlived its block would strike here
    with time_limit(60), time_limit(60):
        assert sum(range(10)) == 45


def test_an_error_inside_is_passed_on() -> None:
    with pytest.raises(KeyError), time_limit(60):
        raise KeyError
