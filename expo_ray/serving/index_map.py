"""Index map from the tensors of a checkpoint to the parameters of an engine: which element goes where, as strides.

An unquantised engine holds slices, concatenations and permutations of what a checkpoint stores. So each copy of a loader is a
regular grid of elements on both sides, and a few integers tell where every element of every parameter comes from.
`expo_ray.on_ray.serving.record_map` records the copies; nothing here knows an engine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from expo_ray.text import first_few, shown


class Irregular(ValueError):
    """Elements that are no regular grid."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A direction of a grid: `size` elements, each this many elements further on in the tensor and in the parameter."""

    size: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of a checkpoint's tensor, and their places in a parameter.

    Element `(i, j, ...)` of the grid is element `source + i * axes[0].source + j * axes[1].source ...` of the tensor and
    element `target + i * axes[0].target ...` of the parameter, both counted in row-major order.

    Attributes:
        tensor: name in the checkpoint.
        parameter: name in the engine's model.
        source, target: indices of the first element.
        axes: the outermost in the tensor first; as few as there can be, none of size 1.
    """

    tensor: str
    parameter: str
    source: int
    target: int
    axes: tuple[Axis, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def run(self) -> int:
        """Number of consecutive elements of the tensor that the innermost axis takes; 1 if it skips some."""
        return self.axes[-1].size if self.axes and self.axes[-1].source == 1 else 1


@dataclass(frozen=True, slots=True)
class Fill:
    """Elements of a parameter that the loader sets to a constant, as it does with rows that pad a vocabulary.

    Attributes:
        axes: of the parameter alone; their `source` is 0.
    """

    parameter: str
    value: float
    target: int
    axes: tuple[Axis, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(axis.size for axis in self.axes)


@dataclass(frozen=True)
class IndexMap:
    """Where all elements of all parameters of one worker come from.

    Attributes:
        shapes: of the parameters as a loader fills them, by name; parameters that share their memory are there once.
        copies: in the order of the checkpoint's tensors.
        fills: constants.
        refused: why the copies of a tensor could not be recorded, by its name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    copies: Sequence[Copy]
    fills: Sequence[Fill] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_parameter(self) -> Mapping[str, Sequence[Copy]]:
        """The copies into each parameter; every parameter is there."""
        return _grouped(self.copies, self.shapes, "parameter")

    @cached_property
    def by_tensor(self) -> Mapping[str, Sequence[Copy]]:
        """The copies from each tensor that this worker holds a part of."""
        return _grouped(self.copies, (), "tensor")

    @cached_property
    def obstacle(self) -> str:
        """The reason why parameters cannot be filled by this map alone; empty if each of their elements is written exactly once."""
        if self.refused:
            name, reason = next(iter(self.refused.items()))
            more = f" (and {len(self.refused) - 1} more tensors)" if len(self.refused) > 1 else ""
            return f"{shown(name)}: {reason}{more}"
        fills: dict[str, list[Fill]] = {}
        for fill in self.fills:
            fills.setdefault(fill.parameter, []).append(fill)
        wrong = [
            f"{name} ({reason})"
            for name, shape in self.shapes.items()
            if (reason := _miscovered(shape, [*self.by_parameter[name], *fills.get(name, ())]))
        ]
        return first_few(wrong) if wrong else ""


def _grouped(copies: Sequence[Copy], keys: Any, attribute: str) -> Mapping[str, Sequence[Copy]]:
    groups: dict[str, list[Copy]] = {key: [] for key in keys}
    for copy in copies:
        groups.setdefault(getattr(copy, attribute), []).append(copy)
    return groups


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next of each dimension, in row-major order."""
    return (
        tuple(accumulate(reversed(shape[1:]), lambda step, size: step * size, initial=1))[::-1]
        if shape
        else ()
    )


def simplified(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The same grid with the outermost axis in the tensor first, and axes joined that continue each other on both sides."""
    ordered = sorted((axis for axis in axes if axis.size > 1), key=lambda axis: (-axis.source, -axis.target))
    joined: list[Axis] = []
    for axis in ordered:
        outer = joined[-1] if joined else None
        if outer and (outer.source, outer.target) == (axis.size * axis.source, axis.size * axis.target):
            joined[-1] = Axis(outer.size * axis.size, axis.source, axis.target)
        else:
            joined.append(axis)
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class AxisPart:
    """Part of an axis that stays within one dimension: `size` times `stride` indices of `dimension`."""

    size: int
    dimension: int
    stride: int


def locate(
    offset: int, axes: Sequence[tuple[int, int]], shape: Sequence[int]
) -> tuple[tuple[int, ...], list[list[AxisPart]]]:
    """Express a grid over a row-major array by the array's dimensions.

    Args:
        offset: index of the first element.
        axes: size and stride of each, strides in elements.
        shape: of the array.

    Returns:
        The coordinates of the first element; and for each axis the parts it is made of, the outermost first.

    Raises:
        Irregular: if an axis runs from one row into the next in an irregular way.
    """
    strides = strides_of(shape)
    start = tuple(offset // stride % size for stride, size in zip(strides, shape, strict=True))
    parts = [_parts_of(axis, start, strides, shape) for axis in axes]
    last = list(start)
    for part in (part for of_axis in parts for part in of_axis if part.stride):
        last[part.dimension] += (part.size - 1) * part.stride
    if any(index >= size for index, size in zip(last, shape, strict=True)):
        raise Irregular(f"a grid with axes {list(axes)} from {offset} on, over {list(shape)}")
    return start, parts


def _parts_of(
    axis: tuple[int, int], start: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> list[AxisPart]:
    size, stride = axis
    if size == 1 or stride == 0:
        return [AxisPart(size, 0, 0)] if size > 1 else []
    for dimension, (step, extent) in enumerate(zip(strides, shape, strict=True)):
        if extent == 1 or stride % step or step > stride:
            continue
        times = stride // step
        if start[dimension] + times * (size - 1) < extent:
            return [AxisPart(size, dimension, times)]
        within = extent // times
        if within > 1 and times * within == extent and start[dimension] < times and size % within == 0:
            outer = _parts_of((size // within, within * stride), start, strides, shape)
            return [*outer, AxisPart(within, dimension, times)]
    raise Irregular(f"an axis of {size} elements, {stride} apart, over {list(shape)}")


def _miscovered(shape: Sequence[int], regions: Sequence[Copy | Fill]) -> str:
    """Say how the regions fail to cover an array exactly once; empty if they do not fail."""
    numel = math.prod(shape)
    written = sum(region.count for region in regions)
    if written != numel:
        return f"{written} of {numel} elements are written"
    try:
        boxes = [_box(region, shape) for region in regions if region.count]
    except Irregular:
        return "" if _covers(numel, regions) else "some elements are written twice, others never"
    return "" if _boxes_cover(boxes, shape) else "some elements are written twice, others never"


Box = list[tuple[int, int]]


def _box(region: Copy | Fill, shape: Sequence[int]) -> Box:
    """First and last index + 1 of each dimension.

    Raises:
        Irregular: if the region is no box of consecutive indices.
    """
    start, parts = locate(region.target, [(axis.size, axis.target) for axis in region.axes], shape)
    sizes = [1] * len(shape)
    for part in sorted((part for of_axis in parts for part in of_axis), key=lambda part: part.stride):
        if part.stride != sizes[part.dimension]:
            raise Irregular("an axis with gaps")
        sizes[part.dimension] *= part.size
    return [(first, first + size) for first, size in zip(start, sizes, strict=True)]


def _boxes_cover(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """True if boxes that together have as many elements as the array are disjoint.

    They are marked in an array with a cell for each stretch between two borders, so that large parameters take no memory.
    """
    borders = [sorted({edge for box in boxes for edge in box[dimension]}) for dimension in range(len(shape))]
    cells = np.zeros([max(1, len(edges) - 1) for edges in borders], np.int32)
    places = [{edge: index for index, edge in enumerate(edges)} for edges in borders]
    for box in boxes:
        cells[
            tuple(slice(place[first], place[end]) for place, (first, end) in zip(places, box, strict=True))
        ] += 1
    return bool((cells <= 1).all())


def _covers(numel: int, regions: Sequence[Copy | Fill]) -> bool:
    written = np.zeros(numel, np.uint8)
    for region in regions:
        view = np.lib.stride_tricks.as_strided(
            written[region.target :],
            [axis.size for axis in region.axes],
            [axis.target for axis in region.axes],
        )
        view += 1
    return bool((written == 1).all())


def source_indices(copy: Copy) -> Iterator[tuple[int, int]]:
    """Index in the tensor and in the parameter of every element, one after the other; for tests and small copies."""
    sources, targets = np.array([copy.source]), np.array([copy.target])
    for axis in copy.axes:
        steps = np.arange(axis.size)
        sources = (sources[:, None] + steps * axis.source).ravel()
        targets = (targets[:, None] + steps * axis.target).ravel()
    yield from zip(sources.tolist(), targets.tolist(), strict=True)


@dataclass(frozen=True)
class Sample:
    """Some elements of a copy, in rows and columns of its parameter.

    Attributes:
        rows: indices of all of the parameter's dimensions but the last.
        columns: indices of the last.
        origins: (rows, columns) indices of the elements in the tensor.
    """

    rows: Sequence[tuple[int, ...]]
    columns: Sequence[int]
    origins: np.ndarray[Any, np.dtype[np.int64]]


def sample(copy: Copy, shape: Sequence[int], count: int, generator: random.Random) -> Sample:
    """Draw at most `count` rows and columns of what a copy writes.

    Args:
        shape: of the parameter.

    Raises:
        Irregular: if the copy is no grid of rows and columns.
    """
    start, parts = locate(copy.target, [(axis.size, axis.target) for axis in copy.axes], shape)
    walked: list[tuple[AxisPart, int]] = []
    for axis, of_axis in zip(copy.axes, parts, strict=True):
        source = axis.source
        for part in reversed(of_axis):
            walked.append((part, source))
            source *= part.size
    last = len(shape) - 1
    rows = _draw(start, [walk for walk in walked if walk[0].dimension != last], count, generator)
    columns = _draw(start, [walk for walk in walked if walk[0].dimension == last], count, generator)
    return Sample(
        [index[:-1] for index in rows],
        [index[-1] for index in columns],
        copy.source + np.array(list(rows.values()))[:, None] + np.array(list(columns.values())),
    )


def _draw(
    start: tuple[int, ...], walked: Sequence[tuple[AxisPart, int]], count: int, generator: random.Random
) -> dict[tuple[int, ...], int]:
    """Indices drawn along some axes, each with its distance in the tensor from the first element."""
    drawn: dict[tuple[int, ...], int] = {}
    for _ in range(count):
        index, distance = list(start), 0
        for part, source in walked:
            times = generator.randrange(part.size)
            index[part.dimension] += times * part.stride
            distance += times * source
        drawn[tuple(index)] = distance
    return dict(sorted(drawn.items()))
