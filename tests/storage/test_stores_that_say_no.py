"""Stores that are asked too much: fewer and larger requests, a pace that all threads share, minutes of patience."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.local_s3 import SeaweedFS
from expo_ray.config import parse_pair
from expo_ray.errors import SlowDown, TransientStorageError
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.shard import extrapolate_shard
from expo_ray.storage import forget_stores, open_store, pace, retry
from expo_ray.storage.object_writer import LARGEST_PART_BYTES, LEAST_PART_BYTES, MAX_PARTS, part_bytes
from expo_ray.storage.pace import Pace, in_a_hurry
from expo_ray.storage.retry import retry_transient
from tests.support.admission_proxy import AdmissionProxy
from tests.support.hub_server import HubServer, Repository
from tests.support.pairs import write_pair

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `pace` and `retry` see; their pauses let it pass at once."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for module in (pace, retry):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(module, "pause", sleep)
    return now


# --- the pace


def _answer(of: Pace, requests: int) -> None:
    for _ in range(requests):
        of.answered(of.wait_for_turn())


def test_nothing_is_slowed_down_until_the_store_refuses(clock: list[float]) -> None:
    free = Pace()
    _answer(free, 1000)
    assert clock == [1000.0]
    assert free.rate is None


def test_a_refusal_halves_the_rate_once_for_a_burst_and_answers_let_it_grow(clock: list[float]) -> None:
    slowed = Pace()
    for _ in range(100):  # 100 requests a second
        slowed.answered(slowed.wait_for_turn())
        clock[0] += 0.01
    turns = [slowed.wait_for_turn() for _ in range(8)]
    for turn in turns:
        slowed.refused(turn)
    first = slowed.rate
    assert first is not None
    assert 40 < first < 60
    before = clock[0]
    _answer(slowed, 50)
    assert slowed.rate is not None
    assert slowed.rate > first
    assert 0.7 < clock[0] - before < 1.1  # 50 requests at about 50 a second
    slowed.refused(slowed.wait_for_turn())
    assert slowed.rate < first


def test_a_store_that_names_a_time_is_left_alone_for_so_long(clock: list[float]) -> None:
    paused = Pace()
    paused.refused(paused.wait_for_turn(), retry_after_s=30)
    assert paused.wait_for_turn() == pytest.approx(1030)


def test_long_after_the_last_refusal_the_pace_is_free_again(clock: list[float]) -> None:
    slowed = Pace()
    slowed.refused(slowed.wait_for_turn())
    clock[0] += 1000
    _answer(slowed, 2)
    assert slowed.rate is None


def test_a_store_that_has_answered_is_asked_for_minutes(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "PATIENCE_S", 300.0)
    known, asked = Pace(), []
    _answer(known, 1)

    def refuse() -> None:
        asked.append(clock[0])
        raise SlowDown("no")

    with pytest.raises(SlowDown, match=r"asked \d+ times in 3\d\d s"):
        retry_transient(refuse, known)
    assert 300 < asked[-1] - asked[0] < 400

    def fail() -> None:
        raise TransientStorageError("no answer")

    before = clock[0]
    with pytest.raises(TransientStorageError, match="asked 6 times"):
        retry_transient(fail, Pace())  # its address may be wrong
    assert clock[0] - before < 20


def test_a_cancelled_job_does_not_wait_for_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE_S", 300.0)
    waiting, begun = Pace(), threading.Event()
    waiting.answered(waiting.wait_for_turn())

    def refuse() -> None:
        begun.set()
        error = SlowDown("no")
        error.retry_after_s = 300
        raise error

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(retry_transient, refuse, waiting)
        begun.wait()
        with in_a_hurry(), pytest.raises(SlowDown):
            future.result(timeout=30)


def test_parts_are_as_large_as_their_memory_allows() -> None:
    assert part_bytes(5 << 30, 96 * MIB) == LARGEST_PART_BYTES == 32 * MIB
    assert part_bytes(5 << 30, 48 * MIB) == 16 * MIB
    assert part_bytes(100 * MIB, 96 * MIB) == 25 * MIB
    assert part_bytes(10 * MIB, 96 * MIB) == LEAST_PART_BYTES
    assert part_bytes(5 << 30, 5 * MIB) == LEAST_PART_BYTES
    assert part_bytes(1 << 40, 64 * MIB) * MAX_PARTS >= 1 << 40


# --- a real store behind a gate


@pytest.fixture
def gate(s3_server: SeaweedFS, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdmissionProxy]:
    with AdmissionProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(pace, "PATIENCE_S", 120.0)
        monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
        forget_stores()
        yield proxy


@pytest.mark.s3
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_the_time_that_a_store_names_is_kept(gate: AdmissionProxy, s3_uri: str, write: bool) -> None:
    store = open_store(s3_uri)
    etag = store.put("model", bytes(MIB)).etag
    gate.rate, gate.retry_after_s = 0, 2
    threading.Timer(0.5, lambda: setattr(gate, "rate", None)).start()
    gate.admitted.clear()
    if write:
        with store.writer("written", 6 * MIB, buffer_bytes=5 * MIB) as writer:
            writer.write(bytes(6 * MIB))
            writer.commit()
    else:
        store.read_into("model", 0, memoryview(bytearray(MIB)), etag=etag)
    assert gate.refused
    # For reads, a second request is needed: the client library shows no headers.
    assert len([at for at in gate.refused if at < gate.refused[0] + 1.9]) <= 2
    assert gate.admitted[0] - gate.refused[0] >= 1.9


@pytest.mark.s3
def test_threads_find_the_rate_that_a_store_admits(gate: AdmissionProxy, s3_uri: str) -> None:
    store = open_store(s3_uri)
    etag = store.put("model", bytes(MIB)).etag
    gate.rate = 20

    def read(number: int) -> None:
        store.read_into("model", number, memoryview(bytearray(64)), etag=etag, once=True)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(150)))
    assert (
        len(gate.refused) < 150
    )  # fewer than were admitted; 16 threads without a pace are refused several times as often


@pytest.mark.s3
@pytest.mark.parametrize("alphas", [1, 10])
def test_parents_are_read_in_few_large_requests_whatever_the_number_of_alphas(
    gate: AdmissionProxy, s3_server: SeaweedFS, s3_uri: str, tmp_path: Path, alphas: int
) -> None:
    plan = _stored_plan(s3_server, s3_uri, tmp_path, alphas)
    gate.inject()
    for alpha in plan.outputs:
        ModelFolder(plan, alpha).claim()
    for index in range(len(plan.shards)):
        extrapolate_shard(plan, index, list(plan.outputs))
    reads = [target for method, target in gate.requests if method == "GET" and "/parents/" in target]
    size = sum(tensor.base.nbytes for shard in plan.shards for tensor in shard.tensors)
    wanted = 2 * (size / (8 * MIB) + 1) * len(plan.shards)
    assert len(reads) <= wanted


def _stored_plan(server: SeaweedFS, uri: str, folder: Path, alphas: int) -> PairPlan:
    """A pair in the bucket, planned; models go to local folders."""
    import torch

    from tests.support.pairs import moved, write_both
    from tests.support.stage import upload

    weights = {f"layer.{index}.weight": torch.randn(1024, 3 * 1024).bfloat16() for index in range(4)}
    local = write_both(folder, weights, moved(weights))
    prefix = uri.removeprefix(f"s3://{server.bucket}/") + "/parents"
    sft, dpo = (upload(server, side, f"{prefix}/{side.name}") for side in local)
    steps = [round(0.1 * (number + 1), 1) for number in range(alphas)]
    pair = parse_pair({"sft": sft, "dpo": dpo, "alphas": steps, "rounding": "nearest"}, "pair")
    return plan_pair(pair, {alpha: str(folder / f"alpha={alpha}") for alpha in pair.alphas})


# --- the Hub


def _use_plan(plan: PairPlan) -> None:
    """What a worker does: open the plan's parents and compute a shard; in a process of its own."""
    extrapolate_shard(plan, 0, list(plan.outputs))


def _plan_on_the_hub(hub: HubServer, folder: Path) -> PairPlan:
    """Put a pair on the stand-in, and plan it; its only folder of a model is claimed."""
    commit = "a" * 40
    for side in write_pair(folder, sft_shards=1, dpo_shards=1):
        files = {file.name: file.read_bytes() for file in side.iterdir()}
        hub.repositories[f"org/{side.name}"] = Repository({commit: files}, {"main": commit})
    pair = parse_pair({"sft": "hf://org/sft", "dpo": "hf://org/dpo", "alphas": [0.5]}, "pair")
    plan = plan_pair(pair, {0.5: str(folder / "out")})
    looked_up = [seen.path for seen in hub.seen if seen.path.startswith("/api/models/")]
    assert sorted(looked_up) == ["/api/models/org/dpo", "/api/models/org/sft"]
    ModelFolder(plan, 0.5).claim()
    hub.seen.clear()
    return plan


def _use_in_processes(plan: PairPlan, count: int) -> list[int | None]:
    """Let so many processes use a plan at the same time; returns their exit statuses."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_use_plan, args=(plan,)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def test_workers_do_not_ask_the_hub_for_what_the_driver_has_seen(
    hub_server: HubServer, tmp_path: Path
) -> None:
    plan = _plan_on_the_hub(hub_server, tmp_path)
    assert _use_in_processes(plan, 2) == [0, 0]
    assert not [seen.path for seen in hub_server.seen if seen.path.startswith("/api/")]
    resolved = [seen.path for seen in hub_server.seen if "/resolve/" in seen.path]
    assert len(resolved) == 2 * 2  # each worker asks once where each file lies


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_many_workers_stay_within_the_limits_of_the_hub_or_wait_for_its_next_window(
    hub_server: HubServer, tmp_path: Path
) -> None:
    """64 processes, and a Hub with a hundredth of its limits in a thirtieth of its time."""
    plan = _plan_on_the_hub(hub_server, tmp_path)
    hub_server.limits, hub_server.window_s = {"api": 5, "resolvers": 30}, 10.0
    assert _use_in_processes(plan, 64) == [0] * 64
    assert not [seen.path for seen in hub_server.seen if seen.path.startswith("/api/")]
    resolved = [seen.path for seen in hub_server.seen if "/resolve/" in seen.path]
    refused = hub_server.refused["resolvers"]
    assert len(resolved) - refused == 64 * 2
    assert refused > 0
