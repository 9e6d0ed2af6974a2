"""Several jobs behind the Ray Serve of one cluster: each deletes what is its own, and what killed ones have left."""

from __future__ import annotations

import json
import signal
import sys
import urllib.error
import urllib.request

import pytest

from tests.support.ray_cluster import Process, RayHead, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]

PATIENCE_S = 200.0


def start(head: RayHead) -> tuple[Process, str, str]:
    """Start a job; returns its URL and the name of its application."""
    process = head.run(sys.executable, "-m", "tests.support.serve_job")
    wait_until(lambda: process.stdout or not process.running, "the job answers", PATIENCE_S)
    assert process.running, process.stderr[-3000:]
    url, name = process.stdout.split()
    return process, url, name


def answer(url: str) -> str:
    """The name of the application, from its refusal of a model that it has no engines for."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/v1/models/late", timeout=30)
    message: str = json.loads(refused.value.read())["error"]["message"]
    return message.removeprefix("late is not served: ")


def is_gone(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=30)
    except urllib.error.HTTPError as error:
        return error.code == 404
    return False


def test_jobs_share_serve_and_delete_their_own_and_what_killed_jobs_left() -> None:
    with RayHead(2) as head:
        first, first_url, first_name = start(head)
        second, second_url, second_name = start(head)
        assert "joining the Ray Serve" in second.stderr
        assert (answer(first_url), answer(second_url)) == (first_name, second_name)

        first.signal(signal.SIGTERM)
        assert first.wait(PATIENCE_S) == 0, first.stderr[-3000:]
        assert answer(second_url) == second_name  # the job that had started Serve is gone
        assert is_gone(first_url)

        second.signal(signal.SIGKILL)
        second.wait()
        third, third_url, third_name = start(head)
        assert f"deleting {second_name}" in third.stderr
        assert answer(third_url) == third_name
        assert is_gone(second_url)
