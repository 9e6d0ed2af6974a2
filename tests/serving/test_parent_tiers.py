"""Where a worker keeps the parents: in memory where they fit, in their files where they do not, with the same bits either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.step import Step
from expo_ray.serving import held_parents, parent_tiers
from expo_ray.serving.held_parents import HeldParents
from expo_ray.serving.host_memory import anonymous_memory
from expo_ray.serving.index_map import Axis, Copy, IndexMap
from expo_ray.serving.parent_tiers import HOST, hold_parents, release_if_short
from expo_ray.serving.slices import Slices
from tests.support.pairs import write_pair

CPU = torch.device("cpu")


@pytest.fixture
def published(tmp_path: Path) -> tuple[Slices, dict[str, torch.Tensor]]:
    """Slices of one worker that holds all of a pair, and the weights that are published at 0.5."""
    sft, dpo = map(str, write_pair(tmp_path))
    words = ["--sft", sft, "--dpo", dpo, "--alpha", "0.5", "--output", f"{tmp_path}/out"]
    assert main(["extrapolate", *words]) == 0
    weights = load_file(tmp_path / "out/model.safetensors")
    copies = [Copy(name, name, 0, 0, (Axis(weight.numel(), 1, 1),)) for name, weight in weights.items()]
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    plan = plan_pair(Pair(name="pair", sft=sft, dpo=dpo), {})
    return Slices(plan, IndexMap(shapes, copies), threads=2), weights


@pytest.fixture
def slices(published: tuple[Slices, dict[str, torch.Tensor]]) -> Iterator[Slices]:
    yield published[0]
    published[0].close()


@pytest.fixture
def are_published(published: tuple[Slices, dict[str, torch.Tensor]]) -> Callable[[Slices], bool]:
    def compare(slices: Slices) -> bool:
        outs = {name: torch.zeros_like(weight) for name, weight in published[1].items()}
        slices.at(Step(0.5)).fill(outs)
        return all(torch.equal(outs[name], weight) for name, weight in published[1].items())

    return compare


def bytes_of_pair(slices: Slices) -> int:
    tensors = [tensor for shard in slices.plan.shards for tensor in shard.tensors]
    return sum(tensor.base.nbytes + (tensor.sft.nbytes if tensor.sft else 0) for tensor in tensors)


def test_parents_that_fit_are_held_and_their_files_are_not_read_again(
    slices: Slices, are_published: Callable[[Slices], bool]
) -> None:
    assert hold_parents(slices, 1, CPU, whole_gpu=False) == HOST
    assert isinstance(slices.parents, HeldParents)
    assert bytes_of_pair(slices) <= slices.parents.memory.numel() < 1.1 * bytes_of_pair(slices) + 4096
    slices.mapped.address = None  # type: ignore[assignment,method-assign]
    assert are_published(slices)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_workers_of_an_engine_take_at_most_half_of_what_can_be_spared(
    workers: int,
    slices: Slices,
    are_published: Callable[[Slices], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    least = 2 * workers * int(1.1 * bytes_of_pair(slices) + 4096)
    monkeypatch.setattr(parent_tiers, "spare_bytes", lambda: least)
    assert hold_parents(slices, workers, CPU, whole_gpu=False) == HOST
    monkeypatch.setattr(parent_tiers, "spare_bytes", lambda: 2 * workers * bytes_of_pair(slices) - 1)
    where = hold_parents(slices, workers, CPU, whole_gpu=False)
    assert where.startswith(
        "files: in memory they take 0.0 GB, more than 0.5 of the 0.0 GB that can be spared"
    )
    assert slices.parents is slices.mapped
    assert are_published(slices)


def test_memory_that_becomes_short_while_it_is_filled_is_given_back(
    slices: Slices, are_published: Callable[[Slices], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def spare() -> int:  # other programs take it meanwhile
        looks.append(0)
        return bytes_of_pair(slices) if len(looks) == 1 else 0

    monkeypatch.setattr(held_parents, "spare_bytes", spare)
    monkeypatch.setattr(held_parents, "_BATCH", 20_000)
    assert hold_parents(slices, 1, CPU, whole_gpu=False).startswith("files: memory became short while ")
    assert len(looks) == 2
    assert slices.parents is slices.mapped
    assert are_published(slices)


def test_parents_are_released_when_memory_becomes_short_later(
    slices: Slices, are_published: Callable[[Slices], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not release_if_short(slices)
    hold_parents(slices, 1, CPU, whole_gpu=False)
    assert not release_if_short(slices)
    monkeypatch.setattr(parent_tiers, "spare_bytes", lambda: -1)
    assert release_if_short(slices)
    assert slices.parents is slices.mapped
    assert are_published(slices)


def test_memory_of_parents_goes_back_to_the_system() -> None:
    def resident_kib() -> int:
        (line,) = (
            row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS:")
        )
        return int(line.split()[1])

    before = resident_kib()
    memory = anonymous_memory(64 << 20)
    memory[:] = 1
    assert resident_kib() - before > 60 << 10
    del memory
    assert resident_kib() - before < 10 << 10
