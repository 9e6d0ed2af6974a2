"""Index maps: grids against numpy's own indexing, and maps of vLLM's models against what its loaders load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expo_ray.serving.index_map import (
    Axis,
    Copy,
    Fill,
    IndexMap,
    Irregular,
    locate,
    simplified,
    source_indices,
    strides_of,
)
from tests.support.vllm_models import ADAPTED_SIZES, forms_of, save_architecture, worker

WORKERS = (1, 2, 4, 8)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_grid_over_an_array_is_expressed_by_the_array_s_dimensions_or_refused(
    shape: list[int], data: st.DataObject
) -> None:
    numel = math.prod(shape)
    offset = data.draw(st.integers(0, numel - 1))
    axes: list[tuple[int, int]] = []
    last = offset
    for _ in range(data.draw(st.integers(0, 3))):
        stride = data.draw(st.integers(0, max(1, numel // 2)))
        size = data.draw(st.integers(1, 4 if stride == 0 else max(1, (numel - 1 - last) // stride + 1)))
        last += (size - 1) * stride
        axes.append((size, stride))
    wanted = np.array([offset])
    for size, stride in axes:
        wanted = (wanted[:, None] + np.arange(size) * stride).ravel()
    try:
        start, parts = locate(offset, axes, shape)
    except Irregular:
        return
    coordinates = np.array([start])
    for step in (step for steps in parts for step in steps):
        moved = np.zeros((step.size, len(shape)), int)
        moved[:, step.dimension] = np.arange(step.size) * step.stride
        coordinates = (coordinates[:, None] + moved).reshape(-1, len(shape))
    assert (coordinates @ np.array(strides_of(shape)) == wanted).all()
    assert (coordinates < np.array(shape)).all()


@given(st.permutations([2, 3, 4]), st.permutations([0, 1, 2]))
def test_views_of_an_array_are_never_refused(shape: list[int], order: list[int]) -> None:
    view = np.arange(24).reshape(shape).transpose(order)[:, 1:]
    axes = [(size, stride // 8) for size, stride in zip(view.shape, view.strides, strict=True)]
    locate(int(view.flat[0]), axes, shape)


def test_axes_are_joined_and_keep_every_pair_of_elements() -> None:
    axes = [Axis(4, 1, 1), Axis(1, 5, 7), Axis(3, 4, 4), Axis(2, 100, 50)]
    copy = Copy("tensor", "parameter", 3, 2, simplified(axes))
    assert copy.axes == (Axis(2, 100, 50), Axis(12, 1, 1))
    assert copy.run == 12
    plain = Copy("tensor", "parameter", 3, 2, tuple(axes))
    assert sorted(source_indices(copy)) == sorted(source_indices(plain))


def region(target: int, *axes: tuple[int, int]) -> Copy:
    return Copy("tensor", "parameter", 0, target, tuple(Axis(size, step, step) for size, step in axes))


@pytest.mark.parametrize(
    ("copies", "reason"),
    [
        ([region(0, (2, 6), (6, 1))], ""),
        ([region(0, (2, 6), (4, 1)), region(4, (2, 6), (2, 1))], ""),
        ([region(0, (6, 2)), region(1, (6, 2))], ""),  # interleaved
        ([region(0, (6, 1))], "6 of 12 elements"),
        ([region(0, (12, 1)), region(3, (3, 1))], "15 of 12 elements"),
        ([region(0, (6, 1)), region(3, (6, 1))], "written twice"),
        ([region(0, (6, 2)), region(0, (6, 2))], "written twice"),
        ([region(0, (2, 6), (3, 1)), region(2, (2, 6), (3, 1))], "written twice"),
    ],
)
def test_a_map_covers_each_element_of_a_parameter_exactly_once_or_says_what_is_wrong(
    copies: list[Copy], reason: str
) -> None:
    obstacle = IndexMap({"parameter": (2, 6)}, copies).obstacle
    assert obstacle.startswith("parameter (") == bool(reason)
    assert reason in obstacle


def test_constants_cover_and_tensors_that_could_not_be_recorded_are_an_obstacle() -> None:
    fill = Fill("parameter", 0.0, 6, (Axis(6, 0, 1),))
    assert IndexMap({"parameter": (2, 6)}, [region(0, (6, 1))], [fill]).obstacle == ""
    refused = IndexMap({"parameter": (2, 6)}, [region(0, (6, 1))], [fill], {"A": "its loader computes"})
    assert refused.obstacle == "A: its loader computes"


# Fused in the engine, fused in the checkpoint, interleaved, one key for all, transposed, tied, biases, experts.
COVERED = ("llama", "qwen2-tied", "phi3", "gpt-neox", "gpt-bigcode", "bloom", "mixtral")


@pytest.mark.vllm
@pytest.mark.parametrize("name", COVERED)
def test_the_map_of_an_architecture_puts_each_element_where_vllm_s_loader_does(
    name: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from expo_ray.on_ray.serving.record_map import record_map

    folder = save_architecture(name, tmp_path / "model", ADAPTED_SIZES)
    weights = load_file(folder / "model.safetensors")
    for workers in WORKERS:
        with worker(folder, workers, workers - 1) as model:
            before = held(model)
            index_map = record_map(model, forms_of(folder))
            assert index_map.obstacle == ""
            assert held(model).keys() == before.keys()  # recording leaves no trace
            assert all(torch.equal(tensor, before[key]) for key, tensor in held(model).items())
            model.load_weights(weights.items())
            loaded = held(model)
        filled = fill(index_map, weights, loaded)
        assert filled.keys() == {key for key, _ in model.named_parameters()}
        for key, tensor in filled.items():
            assert torch.equal(tensor, loaded[key]), f"{key} of {workers} workers"


def held(model: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone().nan_to_num() for key, tensor in model.named_parameters()}


def fill(
    index_map: IndexMap, weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every parameter by the map alone."""
    filled = {key: torch.full_like(like[key], 77.0) for key in index_map.shapes}
    for constant in index_map.fills:
        view(filled[constant.parameter], constant.target, [(a.size, a.target) for a in constant.axes]).fill_(
            constant.value
        )
    for copy in index_map.copies:
        source = view(weights[copy.tensor], copy.source, [(axis.size, axis.source) for axis in copy.axes])
        view(filled[copy.parameter], copy.target, [(axis.size, axis.target) for axis in copy.axes]).copy_(
            source
        )
    return filled


def view(tensor: torch.Tensor, offset: int, axes: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.as_strided(tensor, [size for size, _ in axes], [step for _, step in axes], offset)


@pytest.mark.vllm
def test_a_loader_that_builds_new_tensors_is_an_obstacle_that_names_the_tensor(tmp_path: Path) -> None:
    from expo_ray.on_ray.serving.record_map import record_map

    folder = save_architecture("falcon", tmp_path / "model", ADAPTED_SIZES)
    with worker(folder, 2, 1) as model:
        index_map = record_map(model, forms_of(folder))
    assert "query_key_value.weight: vLLM's loader computes" in index_map.obstacle
    assert {copy.tensor for copy in index_map.copies} & set(index_map.refused) == set()
