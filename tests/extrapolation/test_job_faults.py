"""Whole jobs from S3 to S3 through a network that breaks: the same bytes or a named error, never a torn or wrong model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from examples.local_s3 import SeaweedFS
from expo_ray.extrapolation import in_threads
from expo_ray.storage import connection, forget_stores, object_writer, retry
from tests.support.fault_proxy import Action, Fault
from tests.support.pairs import expo, moved, write_both
from tests.support.ray_cluster import Process, RayBox, wait_until
from tests.support.stage import Stage, digests_of, upload

pytestmark = pytest.mark.s3

MIB = 1 << 20
EVER = 1_000_000
# The first shard is an upload of two parts, the second is sent in one piece.
SHARD_SIZE = "5801kB"
LOST = [
    Action.SLOW_DOWN,
    Action.RESET,
    Action.RESET_BODY,
    Action.TRUNCATE,
    Action.STALL,
    Action.STALL_BODY,
    Action.LOSE_ACK,
]
READS: dict[str, tuple[str, str] | tuple[str, str, int]] = {
    "header": ("GET", "dpo/model"),
    "weights": ("GET", "sft/model", 2),  # behind two readings of the header
    "side file": ("GET", "/generation_config.json"),
}
UPLOADS = {
    "begin": ("POST", r"\?uploads"),
    "part": ("PUT", "partNumber"),
    "complete": ("POST", "uploadId="),
    "whole": ("PUT", r"/model-00002-of-00002\.safetensors"),
}
SMALL_WRITES = {
    "probe": ("PUT", "/probe-"),
    "claim": ("PUT", r"/claim\.json"),
    "receipt": ("PUT", r"/\.expo/\w+/model"),
    "side file": ("PUT", r"/config\.json"),
    "manifest": ("PUT", r"/expo\.json"),
}


@dataclass(frozen=True)
class LightPair:
    """Folders of the parents, here and in S3, and digests of what the local command makes of them, by alpha."""

    local: tuple[Path, Path]
    sft: str
    dpo: str
    digests: Mapping[float, Mapping[str, str]]


@pytest.fixture(scope="session")
def light_pair(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> LightPair:
    folder = tmp_path_factory.mktemp("light")
    generator = torch.Generator().manual_seed(4)
    shapes = {"a.weight": (2900, 1000), "b.weight": (64, 64)}
    sft = {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()
    }
    local = write_both(folder, sft, moved(sft))
    more = f"--shard-size {SHARD_SIZE}"
    assert expo(*local, folder / "out", 0.3, 0.5, rounding="stochastic", more=more) == 0
    digests = {alpha: digests_of(folder / "out" / f"alpha={alpha}") for alpha in (0.3, 0.5)}
    sft_uri, dpo_uri = (upload(s3_server, parent, f"light/{parent.name}") for parent in local)
    return LightPair(local, sft_uri, dpo_uri, digests)


@dataclass(frozen=True)
class Job:
    """`expo-ray extrapolate` of the light pair with one alpha, from S3 to S3 by way of the proxy."""

    stage: Stage
    pair: LightPair

    def command(self, alpha: float = 0.3) -> list[str]:
        words = [
            "--sft",
            self.pair.sft,
            "--dpo",
            self.pair.dpo,
            "--alpha",
            str(alpha),
            "--output",
            self.stage.uri,
        ]
        return [sys.executable, "-m", "expo_ray.cli", "extrapolate", *words, "--shard-size", SHARD_SIZE]

    def run(self, dpo: str = "") -> int:
        """The exit status."""
        more = f"--shard-size {SHARD_SIZE}"
        return expo(
            self.pair.sft, dpo or self.pair.dpo, self.stage.uri, 0.3, rounding="stochastic", more=more
        )

    def complete(self, alpha: float = 0.3) -> bool:
        whole = self.stage.files(self.stage.uri) == self.pair.digests[alpha]
        return whole and "expo.json" in self.stage.listed()

    def assert_finished_by_a_second_run(self) -> None:
        self.stage.way.inject()
        assert self.run() == 0
        assert self.complete()


@pytest.fixture
def job(stage: Stage, light_pair: LightPair, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(in_threads, "MAX_RETRIES", 1)
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 1.5)
    monkeypatch.setattr(object_writer, "LARGEST_PART_BYTES", 5 * MIB)
    monkeypatch.setenv("AWS_ENDPOINT_URL", stage.way.endpoint)
    forget_stores()
    return Job(stage, light_pair)


def faults(action: Action, requests: Mapping[str, tuple[str, str] | tuple[str, str, int]]) -> list[Fault]:
    return [Fault(action, *request) for request in requests.values()]


# --- one fault of each kind


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_READ])
def test_faults_of_reading_change_nothing(job: Job, action: Action) -> None:
    job.stage.way.inject(*faults(action, READS))
    assert job.run() == 0
    assert len(job.stage.way.log) == len(READS)
    assert job.complete()


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_WRITE])
def test_faults_of_small_writes_change_nothing(job: Job, action: Action) -> None:
    job.stage.way.inject(*faults(action, SMALL_WRITES))
    assert job.run() == 0
    assert len(job.stage.way.log) == len(SMALL_WRITES)
    assert job.complete()


@pytest.mark.parametrize("action", [*LOST, Action.FLIP_WRITE])
@pytest.mark.parametrize("request_", UPLOADS)
def test_a_fault_of_an_upload_changes_nothing(job: Job, request_: str, action: Action) -> None:
    job.stage.way.inject(*faults(action, {request_: UPLOADS[request_]}))
    assert job.run() == 0
    assert job.stage.way.log
    assert job.complete()
    unacknowledged = {Action.LOSE_ACK, Action.RESET_BODY, Action.TRUNCATE, Action.STALL_BODY}
    assert len(job.stage.unfinished()) == (request_ == "begin" and action in unacknowledged)


# --- faults that do not end


@pytest.mark.parametrize(
    ("where", "action", "method", "path"),
    [
        ("sft", Action.SLOW_DOWN, *READS["weights"][:2]),
        ("output", Action.SLOW_DOWN, *UPLOADS["part"]),
        ("output", Action.FLIP_WRITE, *UPLOADS["part"]),
        ("output", Action.FLIP_WRITE, *UPLOADS["whole"]),
        ("output", Action.RESET, *SMALL_WRITES["receipt"]),
        ("output", Action.SLOW_DOWN, *SMALL_WRITES["manifest"]),
    ],
)
def test_a_fault_without_end_is_named(  # noqa: PLR0917 - one parameter for each column above
    job: Job, capsys: pytest.CaptureFixture[str], where: str, action: Action, method: str, path: str
) -> None:
    skip = 2 if where == "sft" else 0  # its header
    job.stage.way.inject(Fault(action, method, path, skip, times=EVER))
    assert job.run() == 1
    error = capsys.readouterr().err
    assert "failed: dpo" in error
    assert f": {job.pair.sft if where == 'sft' else job.stage.uri}/" in error
    assert "expo.json" not in job.stage.listed()
    assert job.stage.unfinished() == []
    job.assert_finished_by_a_second_run()


def test_a_dead_server_is_named_and_its_job_finished_later(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        job.stage.server.kill()
        job.stage.way.release()

    job.stage.way.hold(*UPLOADS["part"])
    with meanwhile(job.stage, kill):
        assert job.run() == 1
    assert f"failed: dpo: {job.stage.uri}/model-00001-of-00002.safetensors: " in capsys.readouterr().err
    job.stage.server.start()
    assert "expo.json" not in job.stage.listed()
    job.assert_finished_by_a_second_run()


def test_an_input_replaced_meanwhile_stops_the_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    dpo = upload(job.stage.server, job.pair.local[1], f"{job.stage.uri.rpartition('/')[2]}-dpo")
    job.stage.way.hold(*SMALL_WRITES["claim"])
    with meanwhile(job.stage, lambda: replace(job, dpo)):
        assert job.run(dpo) == 1
    assert f"{dpo}/model.safetensors was replaced since it was planned" in capsys.readouterr().err
    assert [key for key in job.stage.listed() if not key.startswith(".expo/")] == []
    assert job.stage.unfinished() == []


def replace(job: Job, uri: str) -> None:
    """Put sft's weights in the place of dpo's: the same size and header, other bytes."""
    key = f"{uri.removeprefix(f's3://{job.stage.server.bucket}/')}/model.safetensors"
    other = (job.pair.local[0] / "model.safetensors").read_bytes()
    job.stage.server.client().put_object(Bucket=job.stage.server.bucket, Key=key, Body=other)
    job.stage.way.release()


@contextmanager
def meanwhile(stage: Stage, act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread as soon as a request is held back."""

    def wait_and_act() -> None:
        wait_until(lambda: stage.way.waiting, "the job is where it is wanted")
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield
    thread.join()


# --- two jobs, one output


def race(job: Job, box: RayBox, alphas: tuple[float, float]) -> list[Process]:
    """Run two jobs that reach their claims at the same time; return when both have ended."""
    job.stage.way.hold(*SMALL_WRITES["claim"])
    processes = [box.run(*job.command(alpha)) for alpha in alphas]
    wait_until(lambda: job.stage.way.held == len(processes), "both are about to claim the output")
    job.stage.way.release()
    for process in processes:
        process.wait()
    return processes


def test_two_jobs_of_one_plan_both_finish(job: Job, ray_box: RayBox) -> None:
    processes = race(job, ray_box, (0.3, 0.3))
    assert [process.wait() for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
    assert job.complete()


def test_of_two_plans_exactly_one_finishes(job: Job, ray_box: RayBox) -> None:
    alphas = (0.3, 0.5)
    processes = race(job, ray_box, alphas)
    statuses = [process.wait() for process in processes]
    assert sorted(statuses) == [0, 2]
    winner, loser = statuses.index(0), statuses.index(2)
    assert job.complete(alphas[winner])
    assert f"output {job.stage.uri} was claimed by another job" in processes[loser].stderr
