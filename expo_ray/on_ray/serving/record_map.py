"""Record where vLLM's own loaders put each element of a checkpoint: an `IndexMap` of one worker.

Nothing here knows an architecture. The model's `load_weights` runs over tensors without memory (torch's `meta` device), whose views
know offset, shape and strides. Each copy into a parameter is noted instead of made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import mul
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expo_ray.serving.index_map import Axis, Copy, Fill, IndexMap, Irregular, locate, simplified, strides_of
from expo_ray.serving.weights import TORCH_DTYPES
from expo_ray.text import shown

# Copies that may have another layout or dtype than their original, and all of its elements.
_CLONES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}


# Sizes and strides, in elements.
_Axes = list[tuple[int, int]]


@dataclass(frozen=True)
class _Source:
    """Memory that holds elements of one tensor.

    Attributes:
        name: of the tensor.
        offset, shape, stride: the elements of the tensor that the memory holds, in row-major order.
        owner: keeps the memory, whose address identifies it, from being given to another tensor.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    owner: torch.Tensor

    def trace(self, first: int, axes: _Axes) -> tuple[int, list[_Axes]]:
        """Follow a view of this memory, from its element `first` on, to the checkpoint's tensor.

        Returns:
            The index there of the view's first element; and for each axis sizes and strides there.

        Raises:
            Irregular: if the view is no regular grid of them.
        """
        start, parts = locate(first, axes, self.shape)
        offset = self.offset + sum(index * step for index, step in zip(start, self.stride, strict=True))
        return offset, [
            [(part.size, part.stride and part.stride * self.stride[part.dimension]) for part in of_axis]
            for of_axis in parts
        ]


@dataclass(frozen=True)
class _Joined:
    """Memory that holds parts of one tensor joined along a dimension, as `torch.cat` makes it; Falcon's loader does so.

    Attributes:
        shape, dimension: of the joined array, and the one that the parts follow each other in.
        parts: index in that dimension of each part's first element, the part's shape, and its elements.
    """

    name: str
    shape: tuple[int, ...]
    dimension: int
    parts: list[tuple[int, tuple[int, ...], _Source]]
    owner: torch.Tensor

    def trace(self, first: int, axes: _Axes) -> tuple[int, list[_Axes]]:
        """Follow a view within one part; see `_Source.trace`.

        Raises:
            Irregular: if the view is no regular grid, or lies in several parts.
        """
        start, walks = locate(first, axes, self.shape)
        flat = [walk for of_axis in walks for walk in of_axis]
        low = start[self.dimension]
        high = low + sum((walk.size - 1) * walk.stride for walk in flat if walk.dimension == self.dimension)
        for begin, shape, source in self.parts:
            if begin <= low and high < begin + shape[self.dimension]:
                strides = strides_of(shape)
                inside = sum(map(mul, start, strides)) - begin * strides[self.dimension]
                offset, traced = source.trace(
                    inside, [(walk.size, walk.stride * strides[walk.dimension]) for walk in flat]
                )
                rest = iter(traced)
                return offset, [[pair for _ in of_axis for pair in next(rest)] for of_axis in walks]
        raise Irregular("takes a part of a tensor and of what it is joined with")


def record_map(model: Any, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> IndexMap:
    """Record the index map of a model of vLLM's; its weights stay as they are.

    Args:
        model: as this worker holds it, loaded or not; initialised by vLLM's `initialize_model`.
        tensors: safetensors' dtype and shape of the checkpoint's tensors, by name, in its order.

    Returns:
        A map; where loaders compute with values instead of copying them, it says so in `refused`.
    """
    with checkpoint_format(model) as (parameters, shared):
        recorder = _Recorder(parameters)
        with torch.device("cpu"), recorder:
            recorder.drive(model.load_weights, tensors)
    for copy in recorder.copies:
        if copy.parameter in shared:
            reason = f"the engine keeps it in the memory of {shared[copy.parameter]}"
            recorder.refused[copy.tensor] = reason
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in parameters.items()
        if name not in shared and recorder.expected(name, tensor)
    }
    return IndexMap(
        shapes,
        [copy for copy in recorder.copies if copy.parameter in shapes],
        [fill for fill in recorder.fills if fill.parameter in shapes],
        recorder.refused,
    )


class _Recorder(TorchDispatchMode):
    """Notes what is written into parameters instead of writing it.

    Attributes:
        refused: by the tensor's name, why what a loader did with it cannot be expressed.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {_memory(tensor): name for name, tensor in parameters.items()}
        self._strided = {name for name, tensor in parameters.items() if not tensor.is_contiguous()}
        self._sources: dict[int, _Source | _Joined] = {}
        self._loading = ""
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.refused: dict[str, str] = {}

    def drive(self, load: Callable[[Any], Any], tensors: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        """Let a loader load all tensors; if it fails, each alone, so that those it fails at are known."""
        try:
            load(self._stand_ins(tensors))
        except Exception:  # whatever an architecture's own loader raises
            self.copies, self.fills, self.refused = [], [], {}
            for name, form in tensors.items():
                self._drive_alone(load, name, form)

    def _drive_alone(self, load: Callable[[Any], Any], name: str, form: tuple[str, Sequence[int]]) -> None:
        try:
            load(self._stand_ins({name: form}))
        except Exception as error:
            self.refused[name] = (
                f"vLLM's loader looks at its values: {shown(str(error) or type(error).__name__, 120)}"
            )

    def _stand_ins(
        self, tensors: Mapping[str, tuple[str, Sequence[int]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in tensors.items():
            self._loading = name
            tensor = torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype], device="meta")
            self._sources[_memory(tensor)] = _Source(name, 0, tuple(tensor.shape), tensor.stride(), tensor)
            yield name, tensor

    def expected(self, name: str, tensor: torch.Tensor) -> bool:
        """True for what a checkpoint has to fill: parameters, and the buffers that it was seen to fill."""
        return isinstance(tensor, torch.nn.Parameter) or any(copy.parameter == name for copy in self.copies)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        name = None if written is None else self._parameters.get(_memory(written))
        if written is None or name is None:
            result = func(*args, **kwargs)
            if written is not None:
                self._sources.pop(_memory(written), None)  # it no longer holds what the checkpoint does
            elif func in _CLONES:
                self._note_clone(args[0], result)
            elif func is torch.ops.aten.cat.default:
                self._note_join(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), result)
            return result
        try:
            self._note_write(func, name, written, args)
        except Irregular as error:
            self.refused[self._loading] = f"vLLM's loader {error}"
        return written

    def _note_write(self, func: Any, name: str, written: torch.Tensor, args: tuple[Any, ...]) -> None:
        if name in self._strided:
            raise Irregular("fills a parameter that is not stored row after row")
        operation = func.overloadpacket
        if not written.numel():
            return
        if operation is torch.ops.aten.copy_:
            self._note_copy(name, written, args[1])
        elif operation in {torch.ops.aten.fill_, torch.ops.aten.zero_}:
            value = args[1] if len(args) > 1 else 0
            if not isinstance(value, int | float):
                raise Irregular("fills a parameter with a value that it looks up")
            axes = [Axis(size, 0, step) for size, step in zip(written.shape, written.stride(), strict=True)]
            self.fills.append(Fill(name, float(value), int(written.storage_offset()), simplified(axes)))
        else:
            raise Irregular(f"computes with its values ({func})")

    def _note_copy(self, parameter: str, written: torch.Tensor, values: torch.Tensor) -> None:
        source = self._sources.get(_memory(values))
        if source is None:
            raise Irregular("computes with its values, or joins them with others")
        offset, parts = source.trace(*_view(values.expand(written.shape)))
        axes = []
        for steps, stride in zip(parts, written.stride(), strict=True):
            target = int(stride)
            for size, step in reversed(steps):
                axes.append(Axis(size, step, target))
                target *= size
        self.copies.append(
            Copy(source.name, parameter, offset, int(written.storage_offset()), simplified(axes))
        )

    def _note_clone(self, original: torch.Tensor, clone: torch.Tensor) -> None:
        """Remember which elements a copy in new memory holds; `reshape` makes one of a transposed tensor."""
        with suppress(Irregular):  # then a copy from it has no known source
            if clone.is_contiguous():
                self._sources[_memory(clone)] = self._elements_of(original, clone)

    def _note_join(self, tensors: Sequence[torch.Tensor], dimension: int, joined: torch.Tensor) -> None:
        """Remember which elements a copy of several tensors in new memory holds, if all are of one tensor of the checkpoint."""
        with suppress(Irregular):
            parts, begin = [], 0
            for tensor in tensors:
                parts.append((begin, tuple(tensor.shape), self._elements_of(tensor, joined)))
                begin += tensor.shape[dimension]
            if len({source.name for _, _, source in parts}) == 1:
                name, shape = parts[0][2].name, tuple(joined.shape)
                self._sources[_memory(joined)] = _Joined(name, shape, dimension % joined.ndim, parts, joined)

    def _elements_of(self, tensor: torch.Tensor, owner: torch.Tensor) -> _Source:
        """The elements of a tensor, as if they lay in memory one after the other.

        Raises:
            Irregular: if they are not known.
        """
        source = self._sources.get(_memory(tensor))
        if source is None:
            raise Irregular("holds other values than the checkpoint's")
        offset, parts = source.trace(*_view(tensor))
        axes = [axis for of_axis in parts for axis in of_axis]
        return _Source(
            source.name, offset, tuple(size for size, _ in axes), tuple(step for _, step in axes), owner
        )


def _view(tensor: torch.Tensor) -> tuple[int, _Axes]:
    """Index in its memory of a tensor's first element, and its axes there."""
    return int(tensor.storage_offset()), [
        (int(size), int(step)) for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def _memory(tensor: torch.Tensor) -> int:
    """Identify the memory of a tensor, which its views share, even where there is none behind it."""
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that an operation writes into."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                return value
    return None


@contextmanager
def checkpoint_format(model: Any) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Give the layers of a model the parameters that a loader fills, without memory, and afterwards their own again.

    Yields:
        Parameters and buffers by name; and those of them that the model keeps in the memory of another, with its name.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

    names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    infos: list[tuple[Any, Any]] = []
    try:
        for prefix, layer in model.named_modules():
            info: Any = get_layerwise_info(layer)
            own = get_layer_params_buffers(layer)
            info.kernel_tensors = own
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            infos.append((layer, info))
            restore_layer_on_meta(layer, info)
            present: dict[str, torch.Tensor] = get_layer_tensors(layer)
            for name, tensor in present.items():
                full_name = f"{prefix}.{name}" if prefix else name
                tensors[full_name] = tensor
                first = names.setdefault(id(own[0].get(name, tensor)), full_name)
                if first != full_name:
                    shared[full_name] = first
        yield tensors, shared
    finally:
        for layer, info in infos:
            _place_kernel_tensors(layer, info)
            info.reset()
