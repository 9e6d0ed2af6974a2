"""Index maps: grids against numpy's own indexing, and maps of vLLM's models against what its loaders load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

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


class Model(torch.nn.Module):
    """A linear layer, a buffer, and a loader that may do other things with values than copy them."""

    def __init__(self, load: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 4, bias=False)
        self.register_buffer("table", torch.ones(3))
        self.load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.load(self.layer.weight.data, tensor)


def in_halves(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    # Interleaved pairs of rows, as some checkpoints store gate and up.
    parameter[:2].copy_(tensor.view(2, 2, 6).transpose(0, 1).reshape(4, 6)[:2])
    parameter[2:] = tensor[1::2]


def joined_and_taken_apart(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    # As Falcon's queries, keys and values, of groups of heads; and along the last dimension.
    groups = tensor.view(2, 2, 6)
    joined = torch.cat([groups[:, 1].reshape(2, 6), groups[:, :1].reshape(-1, 6)])
    parameter[:2].copy_(joined[2:])
    both = torch.cat((joined[:2, 3:], joined[:2, :3]), dim=-1)
    parameter[2:, :3] = both[:, 3:]
    parameter[2:, 3:].copy_(both[:, :3])


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (in_halves, ""),
        (lambda parameter, tensor: parameter.copy_(tensor.to(torch.float64)), ""),
        (lambda parameter, tensor: parameter.copy_(-tensor.exp()), "computes with its values"),
        (lambda parameter, tensor: parameter.copy_(tensor.mul_(2)), "computes with its values"),
        (lambda parameter, tensor: parameter.copy_(tensor).add_(1), "computes with its values"),
        (joined_and_taken_apart, ""),
        (
            lambda parameter, tensor: parameter.copy_(
                torch.cat([tensor[2:], torch.ones(2, 6, device=tensor.device)])
            ),
            "joins them with others",
        ),
        (
            lambda parameter, tensor: parameter.copy_(torch.cat([tensor[2:], tensor[:2]])),
            "takes a part of a tensor and of what it is joined with",
        ),
        (lambda parameter, tensor: parameter.fill_(tensor[0, 0].item()), "looks at its values"),
        (lambda parameter, tensor: parameter[:3].copy_(tensor[:3]), "18 of 24 elements are written"),
        (lambda parameter, tensor: parameter.copy_(tensor).copy_(tensor), "48 of 24 elements are written"),
    ],
)
def test_what_a_loader_does_beside_copying_is_an_obstacle(
    load: Callable[[torch.Tensor, torch.Tensor], object], reason: str
) -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from expo_ray.on_ray.serving.record_map import record_map

    model = Model(load)
    record_metadata_for_reloading(model)
    weight, before = torch.randn(4, 6), model.layer.weight.detach().clone()
    index_map = record_map(model, {"weight": ("F32", (4, 6))})
    assert reason in index_map.obstacle
    assert bool(index_map.obstacle) == bool(reason)
    assert torch.equal(model.layer.weight, before)
    if not reason:
        model.load_weights([("weight", weight.clone())])
        held = torch.zeros(24)
        for copy in index_map.copies:
            for source, target in source_indices(copy):
                held[target] = weight.flatten()[source]
        assert torch.equal(held.view(4, 6), model.layer.weight)


@pytest.mark.vllm
def test_a_loader_that_computes_is_an_obstacle_that_names_the_tensor(tmp_path: Path) -> None:
    from expo_ray.on_ray.serving.record_map import record_map

    folder = save_architecture("mamba", tmp_path / "model", ADAPTED_SIZES)
    with worker(folder, 2, 1) as model:
        index_map = record_map(model, forms_of(folder))
    assert "mixer.A_log: vLLM's loader computes" in index_map.obstacle
    assert {copy.tensor for copy in index_map.copies} & set(index_map.refused) == set()
