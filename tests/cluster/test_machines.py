"""The whole pipeline, submitted to machines of which one is lost, with its driver on a worker, beside another: the same decisions and bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from examples.local_s3 import SeaweedFS
from tests.support.machine_pipeline import CASES, PAIRS, Case, PipelineMachines, Run, answering
from tests.support.machines import why_not
from tests.support.pairs import llama_tensors, moved, write_both
from tests.support.ray_cluster import wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.timeout(1800),
]

# Answers that a killed engine had given and the driver had not stored are given again, by one engine at most.
MOST_TWICE = 64
# An end with cleaning up; Kubernetes gives a pod 30 s, `ray job stop` waits for a minute.
STOP_S = 60.0


@pytest.fixture(scope="module")
def machines(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelineMachines]:
    if reason := why_not():
        pytest.skip(f"no machines can be made here: {reason}")
    with PipelineMachines(s3_server, tmp_path_factory.mktemp("machines")) as made:
        made.prepare()
        yield made


@pytest.fixture(scope="module")
def undisturbed(machines: PipelineMachines) -> Run:
    run = machines.run_case("undisturbed", CASES["undisturbed"])
    assert run.statuses == [0], run.log[-6000:]
    assert run.twice("responses") == run.twice("rewards") == 0
    assert set(run.decisions()) == set(PAIRS)
    assert len(run.digests()) >= len(PAIRS)
    return run


def assert_same(run: Run, undisturbed: Run) -> None:
    assert run.decisions() == undisturbed.decisions()
    assert run.digests() == undisturbed.digests()
    for kind in ("responses", "rewards"):
        assert run.rows(kind).keys() == undisturbed.rows(kind).keys()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.act])
def test_a_lost_machine_costs_time_and_nothing_else(
    machines: PipelineMachines, undisturbed: Run, name: str
) -> None:
    machines.replace_lost()
    run = machines.run_case(name.replace(" ", "-"), CASES[name])
    assert run.statuses[-1] == 0, run.log[-6000:]
    assert_same(run, undisturbed)
    assert run.twice("responses") <= MOST_TWICE
    assert run.twice("rewards") <= MOST_TWICE


def test_the_driver_may_be_on_a_worker(machines: PipelineMachines, undisturbed: Run) -> None:
    machines.replace_lost()
    run = machines.run_case("driver", Case(), "--entrypoint-num-cpus", "1")
    assert run.statuses == [0], run.log[-6000:]
    assert run.status()["driver"].split(",")[0] != "host1", "the head is the first machine"
    assert_same(run, undisturbed)


def test_two_pipelines_at_once_share_the_cluster(machines: PipelineMachines, undisturbed: Run) -> None:
    machines.replace_lost()
    runs = [machines.begin(f"beside-{name}", name) for name in PAIRS]
    for run in runs:
        assert run.process
        assert run.process.wait() == 0, run.log[-6000:]
    decisions = {name: decision for run in runs for name, decision in run.decisions().items()}
    digests = {key: digest for run in runs for key, digest in run.digests().items()}
    assert (decisions, digests) == (undisturbed.decisions(), undisturbed.digests())


def test_a_stopped_job_ends_soon_and_leaves_no_engine(machines: PipelineMachines, undisturbed: Run) -> None:
    machines.replace_lost()
    run = machines.begin("stopped", flags=("--submission-id", "to-stop"))
    assert run.process
    wait_until(lambda: answering(run), "it answers")
    began = time.monotonic()
    stop = machines.head.run(
        "ray", "job", "stop", "to-stop", RAY_ADDRESS="http://127.0.0.1:8265", PYTHONPATH=""
    )
    assert stop.wait() == 0, stop.stderr
    assert run.process.wait() == 0, "as of a job that somebody has stopped"
    assert "was stopped" in run.log
    assert time.monotonic() - began < STOP_S
    assert run.status()["state"] == "interrupted"
    assert "run the same command again" in run.log
    wait_until(
        lambda: not any(worker.runs("Server:") for worker in machines.workers), "its engines are gone", STOP_S
    )
    again = machines.begin("stopped")
    assert again.process
    assert again.process.wait() == 0, again.log[-6000:]
    assert again.status()["attempt"] == 2
    assert_same(again, undisturbed)


def save_job(folder: Path, output: str) -> str:
    """A job of a pair on this machine's disk."""
    sft = llama_tensors(seed=1)
    parents = write_both(folder, sft, moved(sft))
    job = {
        "output": output,
        "pairs": [{"name": "p", "sft": str(parents[0]), "dpo": str(parents[1]), "alphas": [0.5]}],
    }
    (folder / "local.yaml").write_text(yaml.safe_dump(job))
    return str(folder / "local.yaml")


def test_a_local_path_is_refused_unless_every_machine_sees_it(
    machines: PipelineMachines, tmp_path: Path
) -> None:
    machines.replace_lost()
    script = "jobs/extrapolate.py"
    own = machines.ray_folder / "results"  # each machine has its own
    refused = machines.submit(machines.checkout, script, save_job(tmp_path, str(own)))
    assert refused.wait() != 0
    text = refused.stdout + refused.stderr
    assert (
        f"output: {own} is a local path, and 2 of the cluster's 3 machines do not have the same files there"
        in text
    )
    assert all(worker.address in text for worker in machines.workers)
    assert "Traceback" not in text
    assert machines.head.run("ls", str(own)).wait() != 0, "nothing was left"

    shared = tmp_path / "out"  # all machines have the same disk
    accepted = machines.submit(machines.checkout, script, save_job(tmp_path, str(shared)))
    assert accepted.wait() == 0, accepted.stdout + accepted.stderr
    assert json.loads((shared / "pairs" / "p" / "alpha=0.5" / "expo.json").read_text())
