"""Whole jobs on Ray whose worker, driver, node or S3 server dies in the middle: the same bytes, and little done twice."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.machines import Machine, Machines
from tests.support.ray_cluster import Process, RayBox, RayHead, ended, wait_until, working
from tests.support.stage import PART, SHARDS, Stage

pytestmark = [pytest.mark.ray, pytest.mark.s3]

LAST = "model-00003"
Starter = Callable[[RayBox], Process]


@pytest.fixture
def all_but_one(stage: Stage) -> Starter:
    """A function that starts a job and returns when all its shards are stored but one, which is in mid-upload."""

    def start(box: RayBox) -> Process:
        stage.way.hold("PUT", rf"/{LAST}-of-\d+\.safetensors\?.*partNumber")
        job = box.job(stage.job_file())
        receipts = 2 * (SHARDS - 1)
        wait_until(lambda: len(stage.receipts()) == receipts, "all shards but one are stored")
        wait_until(lambda: len(stage.way.waiting) == 2, "that one is in mid-upload for both alphas")
        assert stage.shown() == []
        return job

    return start


def _worker_of_the_last(process: int) -> psutil.Process:
    """The worker below a process that is in the last shard, once those of the others have ended theirs."""
    wait_until(lambda: len(working(process)) == 1, "one worker is in a shard")
    (worker,) = working(process)
    return worker


def test_a_killed_worker_costs_one_shard(stage: Stage, ray_head: RayHead, all_but_one: Starter) -> None:
    job = all_but_one(ray_head)
    worker = _worker_of_the_last(ray_head.pid)
    worker.kill()
    stage.way.release()
    assert job.wait() == 0, job.stderr
    assert stage.complete()
    assert stage.begun_again() == {LAST: 1}
    assert (
        stage.unfinished() == [LAST] * 2
    )  # of the dead worker, one for each alpha: nobody else knows their ids


def test_a_killed_driver_costs_one_shard(stage: Stage, ray_head: RayHead, all_but_one: Starter) -> None:
    job = all_but_one(ray_head)
    wait_until(lambda: stage.status()["state"] == "running", "status.json shows it")
    job.signal(signal.SIGKILL)
    job.wait()
    wait_until(lambda: not working(ray_head.pid), "the dead driver's worker has ended")
    stage.way.release()
    assert stage.shown() == []
    assert stage.status()["state"] == "running"  # with an `updated` that grows old

    again = ray_head.job(stage.job_file())
    assert again.wait() == 0, again.stderr
    assert stage.complete()
    assert stage.begun_again() == {LAST: 1}
    assert set(stage.unfinished()) == {LAST}


def test_a_killed_driver_takes_its_own_ray_along(stage: Stage, ray_box: RayBox, all_but_one: Starter) -> None:
    job = all_but_one(ray_box)
    worker = _worker_of_the_last(job.pid)
    left_over = Path(worker.environ()["RAY_AUTH_TOKEN_PATH"]).parent
    job.signal(signal.SIGKILL)
    job.wait()
    stage.way.release()  # the orphan ends with its shard
    wait_until(lambda: ended(worker), "its worker has ended")
    assert stage.shown() == []
    shutil.rmtree(left_over)  # Ray's logs

    again = ray_box.job(stage.job_file())
    assert again.wait() == 0, again.stderr
    assert stage.complete()
    assert set(stage.begun_again()) <= {LAST}


def test_a_server_killed_for_a_moment_is_waited_for(
    stage: Stage, ray_head: RayHead, all_but_one: Starter
) -> None:
    job = all_but_one(ray_head)
    stage.server.kill()
    stage.way.release()
    stage.server.start()
    assert job.wait() == 0, job.stderr
    assert stage.complete()
    assert set(stage.begun_again()) <= {LAST}


@pytest.fixture
def on_machines(stage: Stage, machines: Machines) -> Stage:
    """The stage of jobs that are started on the head of a cluster of machines."""
    machines.replace_lost()
    machines.way.release()
    machines.way.inject()
    return replace(stage, way=machines.way)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1200)  # the first of them starts the machines
@pytest.mark.parametrize("lose", [Machine.kill, Machine.cut])
def test_the_shards_of_a_lost_machine_are_done_on_another(
    on_machines: Stage, machines: Machines, lose: Callable[[Machine], None]
) -> None:
    stage = on_machines
    stage.way.hold(*PART)
    job = machines.job(stage.job_file())
    wait_until(lambda: len(stage.way.waiting) == 2 * SHARDS, "all shards are in mid-upload")
    lost, other = machines.workers
    assert (lost.shards, other.shards) == (2, 2)
    lose(lost)
    stage.way.release()
    assert job.wait() == 0, job.stderr
    assert stage.complete()
    assert list(stage.begun_again().values()) == [1, 1]
