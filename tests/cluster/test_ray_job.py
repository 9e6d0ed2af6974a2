"""`python jobs/extrapolate.py` from S3 to S3: on a Ray it starts itself, on a running one, and submitted as a Ray job."""

from __future__ import annotations

import _thread
import ipaddress
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from examples.local_s3 import SeaweedFS
from expo_ray.config import load_job
from expo_ray.errors import ArithmeticFault, JobError, TransientStorageError
from expo_ray.extrapolation.plan_job import outputs_of, plan_job
from expo_ray.extrapolation.run_job import Outcome, run_job
from expo_ray.progress import Progress
from expo_ray.storage.retry import ATTEMPTS
from tests.support.fault_proxy import Action, Fault
from tests.support.pairs import llama_tensors, moved, write_both
from tests.support.paths import ROOT
from tests.support.ray_cluster import Process, RayBox, RayHead, ended, wait_until, working
from tests.support.stage import ALPHAS, PART, RECEIPT, SHARDS, Stage, upload

pytestmark = [pytest.mark.ray, pytest.mark.s3]

EVER = 1_000_000
Broken = dict[str, tuple[str, str]]


@pytest.fixture(scope="session")
def broken_pair(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """A pair whose dpo has diverged."""
    sft = llama_tensors(seed=7)
    dpo = moved(sft)
    dpo["lm_head.weight"][5] = torch.nan
    sft_folder, dpo_folder = write_both(tmp_path_factory.mktemp("broken"), sft, dpo)
    return {
        "broken": (upload(s3_server, sft_folder, "broken/sft"), upload(s3_server, dpo_folder, "broken/dpo"))
    }


# --- on its own Ray


def test_a_job_on_a_ray_of_its_own(stage: Stage, ray_box: RayBox, broken_pair: Broken) -> None:
    stage.way.hold(*PART)
    job = ray_box.job(stage.job_file(pairs=broken_pair))
    wait_until(
        lambda: stage.way.waiting and "shards, " in job.stderr, "shards are under way and a line shows it"
    )
    wait_until(lambda: stage.status()["state"] == "running", "status.json shows it, too")
    assert stage.status()["shards"]["all"] == SHARDS + 1
    family = [psutil.Process(job.pid), *job.descendants()]
    assert_on_loopback_alone(family)
    stage.way.release()

    assert job.wait() == 1
    assert stage.complete()
    assert sorted(stage.shown()) == [f"pairs/big/alpha={alpha}" for alpha in ALPHAS]
    assert re.search(r"failed: broken: .*lm_head\.weight \(64 NaN", job.stderr)
    assert f"{stage.model(0.3)}: alpha 0.3 (effective 0." in job.stdout
    end = stage.status()
    assert (end["state"], end["published"], end["failed"]) == ("failed", 2, ["broken"])
    assert end["shards"] == {"done": SHARDS, "all": SHARDS + 1}
    weights = [entry["Size"] for key, entry in stage.listed().items() if key.endswith(".safetensors")]
    assert end["bytes"]["done"] == sum(weights)
    assert not re.search(r"worker\.py|dashboard|raylet|\x1b|Traceback", job.stderr + job.stdout)
    assert list((ray_box.folder / "home").iterdir()) == []
    assert [process for process in family if not ended(process)] == []

    stage.way.inject()
    again = ray_box.job(stage.job_file())
    assert again.wait() == 0, again.stderr
    written = {target for method, target in stage.way.requests if method not in {"GET", "HEAD"}}
    assert written == {f"/{stage.uri.removeprefix('s3://')}/status.json"}
    assert stage.status()["state"] == "done"


def assert_on_loopback_alone(processes: list[psutil.Process]) -> None:
    listening = [
        ipaddress.ip_address(connection.laddr.ip)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert [ip for ip in listening if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback] == []


def test_a_dry_run_writes_nothing_and_needs_no_ray(stage: Stage, ray_box: RayBox) -> None:
    job = ray_box.job(stage.job_file(), "--dry-run")
    assert job.wait() == 0
    assert f"{SHARDS}       0.3 0.5" in job.stdout
    assert stage.listed() == {}
    assert {method for method, _ in stage.way.requests} <= {"GET", "HEAD"}
    assert "Ray" not in job.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_no_upload_and_goes_on_later(
    stage: Stage, ray_box: RayBox, number: signal.Signals
) -> None:
    stage.way.slow(*PART, delay_s=0.5)
    job = ray_box.job(stage.job_file())
    wait_until(lambda: stage.way.count(*RECEIPT) and stage.unfinished(), "a receipt and an upload are there")
    if number is signal.SIGINT:
        os.killpg(job.pid, number)  # Ctrl-C reaches Ray's processes, too
    else:
        job.signal(number)
    assert job.wait() == 130
    assert "interrupted; run the same command again" in job.stderr
    assert stage.unfinished() == []
    assert stage.shown() == []
    assert stage.status()["state"] == "interrupted"
    done = set(stage.way.count(*RECEIPT))
    stage.way.release()
    stage.way.inject()
    again = ray_box.job(stage.job_file())
    assert again.wait() == 0, again.stderr
    assert stage.complete()
    assert done
    assert set(stage.way.count(*RECEIPT)).isdisjoint(done)


def test_two_jobs_at_once_have_a_ray_each(stage: Stage, ray_box: RayBox) -> None:
    stage.way.hold("PUT", "/b/.*partNumber")
    second = ray_box.job(stage.job_file(alphas=[0.3], output=f"{stage.uri}/b"))
    wait_until(lambda: stage.way.waiting, "the second job works")
    first = ray_box.job(stage.job_file(alphas=[0.3], output=f"{stage.uri}/a"))
    assert first.wait() == 0, first.stderr
    stage.way.release()
    assert second.wait() == 0, second.stderr
    for output in "ab":
        assert stage.files(f"{stage.uri}/{output}/pairs/big/alpha=0.3") == stage.pair.digests[0.3]


# --- a Ray that is there


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_a_cluster_that_cannot_be_used_is_named_at_once(stage: Stage, ray_box: RayBox, address: str) -> None:
    job = ray_box.job(stage.job_file(), RAY_ADDRESS=address)
    assert job.wait() == 2
    assert re.search(rf"error: RAY_ADDRESS is {address}, .* unset ", job.stderr)


def test_a_cluster_that_is_gone_is_not_waited_for(stage: Stage, ray_box: RayBox) -> None:
    (ray_box.folder / "ray").mkdir()
    (ray_box.folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    job = ray_box.job(stage.job_file())
    assert job.wait() == 0, job.stderr
    assert re.search(r"cluster at 127\.0\.0\.1:1.* is gone", job.stderr)
    assert stage.complete()


def test_four_workers_write_the_same_bytes(stage: Stage, ray_head: RayHead) -> None:
    stage.way.hold(*PART)
    job = ray_head.job(stage.job_file())
    wait_until(lambda: len(working(ray_head.pid)) == SHARDS, "every shard has its worker")
    stage.way.release()
    assert job.wait() == 0, job.stderr
    assert f"connected to the Ray cluster at {ray_head.environment['RAY_ADDRESS']}" in job.stderr
    assert len(re.findall(r"big model-0000\d-of-00004\.safetensors: .*B in .* s on ", job.stderr)) == SHARDS
    assert stage.complete()


# --- inside this process


@pytest.fixture
def run_here(ray_here: None, aws_environment: dict[str, str]) -> Callable[[Path], Outcome]:
    """A function that runs a job file on the Ray of this process, which has one worker."""
    from expo_ray.on_ray.extrapolation import OnRay

    def run(file: Path) -> Outcome:
        job = load_job(file)
        plan = plan_job(job.pairs, [outputs_of(job, pair) for pair in job.pairs])
        with Progress("extrapolate", quiet=True) as progress, OnRay(progress, device="cpu") as executor:
            return run_job(plan, executor, progress)

    return run


Run = Callable[[Path], Outcome]


def test_one_worker_writes_the_same_bytes(stage: Stage, run_here: Run) -> None:
    assert run_here(stage.job_file()).failures == {}
    assert stage.complete()


def test_a_transient_error_costs_one_shard_once_more(stage: Stage, run_here: Run) -> None:
    # As often as the part is sent again by itself.
    part = r"alpha[^/]*0\.3/model-00002.*partNumber=1(&|$)"
    stage.way.inject(Fault(Action.FLIP_WRITE, "PUT", part, times=ATTEMPTS))
    assert run_here(stage.job_file()).failures == {}
    assert stage.begun_again() == {"model-00002": 1}
    assert stage.complete()
    assert stage.unfinished() == []


def test_only_transient_errors_are_tried_again_and_all_arrive_as_they_are(
    stage: Stage, run_here: Run, broken_pair: Broken
) -> None:
    from expo_ray.on_ray.watched_tasks import MAX_RETRIES

    stage.way.inject(Fault(Action.FLIP_WRITE, "PUT", r"model-00002.*partNumber", times=EVER))
    outcome = run_here(stage.job_file(pairs=broken_pair, alphas=[0.3]))
    kinds: dict[str, type[Exception]] = {name: type(error) for name, error in outcome.failures.items()}
    assert kinds == {"big": TransientStorageError, "broken": ArithmeticFault}
    assert stage.begun_again() == {"model-00002": MAX_RETRIES}
    assert stage.shown() == []
    assert stage.unfinished() == []


def test_a_shard_that_moves_no_byte_is_begun_again(
    stage: Stage, run_here: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from expo_ray.on_ray import watched_tasks

    monkeypatch.setattr(watched_tasks, "STALLED_S", 10.0)
    monkeypatch.setattr(watched_tasks, "LOOK_S", 1.0)
    stage.way.hold("PUT", r"model-00002.*partNumber")
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(run_here, stage.job_file())
        wait_until(lambda: "it moved nothing for" in caplog.text or outcome.done(), "the shard is given up")
        stage.way.release()
        assert outcome.result().failures == {}
    assert stage.complete()
    assert stage.begun_again() == {"model-00002": 1}


def test_a_cancelled_shard_cleans_up_undisturbed() -> None:
    from expo_ray.on_ray.extrapolation import run_until_cancelled

    # Workers of Ray have Python's own handler; a command that ran in this process before has left another one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    cleaned_up = False

    def work(on_bytes: Callable[[int], None]) -> None:
        nonlocal cleaned_up
        try:
            _thread.interrupt_main()
            while True:
                on_bytes(1)
                time.sleep(0.01)
        finally:
            _thread.interrupt_main()
            time.sleep(0.5)
            cleaned_up = True

    try:
        with pytest.raises(KeyboardInterrupt):
            run_until_cancelled(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleaned_up


def test_an_alpha_that_overflows_fails_alone(stage: Stage, s3_server: SeaweedFS, run_here: Run) -> None:
    sft = llama_tensors(dtype=torch.float16)
    dpo = moved(sft)
    sft["model.norm.weight"][3], dpo["model.norm.weight"][3] = 20_000, 40_000
    folders = write_both(stage.folder, sft, dpo)
    name = stage.uri.rpartition("/")[2]
    wide = [upload(s3_server, folder, f"{name}-{folder.name}") for folder in folders]
    outcome = run_here(stage.job_file(pairs={"wide": tuple(wide)}, alphas=[0.3, 8]))
    assert {name: type(error) for name, error in outcome.failures.items()} == {
        "wide alpha=8": ArithmeticFault
    }
    assert sorted(stage.shown()) == ["pairs/big/alpha=0.3", "pairs/big/alpha=8", "pairs/wide/alpha=0.3"]


def test_a_cluster_without_nodes_is_waited_for(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from expo_ray.on_ray.extrapolation import OnRay

    caplog.set_level("INFO", "expo_ray")
    seen = iter([{}, {"CPU": 640.0, "shard_io": 160.0}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(seen))
    with OnRay(Progress("extrapolate", quiet=True)) as executor:
        assert executor.slots == 160
    assert caplog.messages == ["waiting for the cluster's first worker node"]


def test_shards_ask_for_no_gpu_unless_told_to(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from expo_ray.on_ray.extrapolation import OnRay, ShardReport

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 8.0})
    plan: Any = SimpleNamespace(name="pair", shards=[SimpleNamespace(file="model.safetensors")])
    with OnRay(
        Progress("extrapolate", quiet=True), shard_task=lambda *_: ShardReport(1, 0.0, "here")
    ) as executor:
        # The real cluster has no GPU, so a task that asked for some would never start.
        assert executor.extrapolate(plan, 0, [0.5]).result(timeout=500) == {}


def test_cuda_on_a_cluster_without_gpus_is_refused(ray_here: None) -> None:
    from expo_ray.on_ray.extrapolation import OnRay

    with pytest.raises(
        JobError, match="`device: cuda` is asked for, and the cluster has no GPU; start a GPU"
    ):
        OnRay(Progress("extrapolate", quiet=True), device="cuda")


# --- ray job submit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that a user would submit, and nothing else."""
    for part in ("expo_ray", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / "checkout" / part, ignore=ignored)
    return tmp_path / "checkout"


def ray_job(head: RayHead, action: str, *words: str) -> Process:
    """Start `ray job ACTION`."""
    return head.run("ray", "job", action, "--address", head.dashboard, *words)


def submit(head: RayHead, checkout: Path, job_file: Path, *words: str) -> Process:
    """Start the command that the README gives for it."""
    # Not copied into the checkout: what is sent stays the same for all tests, and so is sent and compiled once.
    command = ["--working-dir", str(checkout), "--", "python", "jobs/extrapolate.py", str(job_file)]
    return ray_job(head, "submit", *words, *command)


def test_a_submitted_job(stage: Stage, ray_head: RayHead, checkout: Path) -> None:
    submitted = submit(ray_head, checkout, stage.job_file())
    assert submitted.wait() == 0, submitted.stdout + submitted.stderr
    assert f"{stage.model(0.5)}: alpha 0.5 (effective 0." in submitted.stdout
    assert f"published {stage.model(0.5)}" in submitted.stdout
    assert stage.complete()


def test_driver_and_workers_use_what_was_submitted(ray_head: RayHead, checkout: Path) -> None:
    code = """
import os, ray, expo_ray
@ray.remote
def where():
    import expo_ray
    return expo_ray.__file__
ray.init()
print("driver", expo_ray.__file__)
print("worker", ray.get(where.remote()))
"""
    (checkout / "where.py").write_text(code)
    submitted = ray_job(ray_head, "submit", "--working-dir", str(checkout), "--", "python", "where.py")
    assert submitted.wait() == 0, submitted.stdout + submitted.stderr
    for who in ("driver", "worker"):
        assert re.search(rf"{who} {ray_head.folder}/\S*/expo_ray/__init__\.py", submitted.stdout)


def test_a_failed_pair_fails_the_submitted_job(
    stage: Stage, ray_head: RayHead, checkout: Path, broken_pair: Broken
) -> None:
    submitted = submit(ray_head, checkout, stage.job_file(pairs=broken_pair, alphas=[0.3]))
    assert submitted.wait() == 1
    assert "failed: broken: " in submitted.stdout
    assert stage.complete(0.3)


def test_a_stopped_job_leaves_no_upload(stage: Stage, ray_head: RayHead, checkout: Path) -> None:
    stage.way.slow(*PART, delay_s=1.5)
    submitted = submit(ray_head, checkout, stage.job_file(), "--no-wait", "--submission-id", "to-be-stopped")
    wait_until(stage.unfinished, "an upload is under way")
    assert ray_head.ask("POST", "/api/jobs/to-be-stopped/stop") == {"stopped": True}
    assert submitted.wait() == 0, submitted.stdout + submitted.stderr
    job = "/api/jobs/to-be-stopped"
    wait_until(lambda: ray_head.ask("GET", job)["status"] == "STOPPED", "the job is stopped")
    assert stage.unfinished() == []
    assert stage.shown() == []
    assert stage.status()["state"] == "interrupted"
