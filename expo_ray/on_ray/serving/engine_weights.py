"""Find the elements of a checkpoint's tensors in a running engine, and read the values that it computes with.

Like `engine_adapter` this file knows private names of vLLM.

Nothing here knows an architecture. The index map says where each element goes: fused, transposed, sliced or one of many experts.
Where there is none, because a loader looks at values, it is given tensors that hold the indices of their elements instead of
weights. Layers that pack their weights are given indices as well, or are probed: multiplied with unit vectors, a linear layer
returns its columns, however it has packed them.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from expo_ray.serving.index_map import Copy, IndexMap, Irregular, sample
from expo_ray.serving.weight_check import Place, TracedTensor

# Places that are kept of each tensor, in each of two directions.
GRID = 32


class VllmWeights:
    """The weights that an engine of this process holds; see `expo_ray.serving.weight_check.EngineWeights`.

    Args:
        model: vLLM's, whose layers may hold several tensors of the checkpoint, or a slice of one.
        dtype: that the engine computes in.
        index_map: of this worker; with an obstacle it serves as well for the tensors that it has.
    """

    def __init__(self, model: Any, dtype: torch.dtype, index_map: IndexMap) -> None:
        self._model, self.dtype, self._map = model, dtype, index_map
        self._modules = dict(model.named_modules())
        self._traced_by_labels = lru_cache(maxsize=1024)(trace)

    def trace(self, name: str, shape: Sequence[int], generator: random.Random) -> TracedTensor:
        if name in self._map.refused:
            return self._traced_by_labels(self._model, name, tuple(shape))
        copies = self._map.by_tensor.get(name, ())
        try:
            return TracedTensor(bool(copies), [self._place(copy, shape, generator) for copy in copies])
        except Irregular:
            return self._traced_by_labels(self._model, name, tuple(shape))

    def _place(self, copy: Copy, shape: Sequence[int], generator: random.Random) -> Place:
        prefix, _, parameter = copy.parameter.rpartition(".")
        held_shape = self._map.shapes[copy.parameter]
        drawn = sample(copy, held_shape, GRID, generator)
        origins = torch.from_numpy(np.stack(np.unravel_index(drawn.origins, tuple(shape)), axis=-1))
        return Place(self._modules[prefix], parameter, held_shape, drawn.rows, drawn.columns, origins)

    def held_values(self, place: Place) -> list[torch.Tensor]:
        return held_values(self._model, place, self.dtype)


def trace(model: Any, name: str, shape: Sequence[int]) -> TracedTensor:
    """Follow one tensor through vLLM's loader; the weights stay as they are.

    Args:
        model: vLLM's, whose layers may hold several tensors of the checkpoint, or a slice of one.
        name: as the checkpoint has it.
        shape: of the whole tensor.

    Raises:
        Exception: any, if the loader does not take this tensor alone.
    """
    grids: dict[tuple[Any, str], _Grid] = {}
    for dimension, size in enumerate(shape):
        along = [size if index == dimension else 1 for index in range(len(shape))]
        # From 1 on: 0 marks what does not come from this tensor. An expanded view takes no memory.
        labels = torch.arange(1, size + 1, dtype=torch.int32).view(along).expand(*shape)
        with _sheets(model) as sheets:
            model.load_weights([(name, labels)])
        for key, sheet in sheets.items():
            grids.setdefault(key, _Grid(sheet, random.Random(name))).read(sheet)
    places = [grid.place(module, parameter, shape) for (module, parameter), grid in grids.items()]
    return TracedTensor(bool(grids), [place for place in places if place is not None])


class _Grid:
    """Places of one parameter, chosen once, and the labels that each pass has left there."""

    def __init__(self, sheet: torch.Tensor, chosen: random.Random) -> None:
        self._shape = tuple(sheet.shape)
        first = sheet if sheet.ndim == 1 else sheet[..., 0]
        self._rows = _some_places(first, chosen) if sheet.ndim > 1 else [()]
        self._columns = [last for (last,) in _some_places(sheet[self._rows[0]], chosen)] if self._rows else []
        self._labels: list[torch.Tensor] = []

    def read(self, sheet: torch.Tensor) -> None:
        if self._columns:
            self._labels.append(torch.stack([sheet[row][self._columns] for row in self._rows]))

    def place(self, module: Any, parameter: str, shape: Sequence[int]) -> Place | None:
        if not self._columns or len(self._labels) != len(shape):
            return None
        origins = torch.stack(self._labels, dim=-1).long() - 1
        if (origins < 0).any() or (origins >= torch.tensor(list(shape))).any():
            return None  # a loader that computes with the values
        return Place(module, parameter, self._shape, self._rows, self._columns, origins)


def _some_places(labels: torch.Tensor, chosen: random.Random) -> list[tuple[int, ...]]:
    indices = labels.nonzero().tolist()
    picked = chosen.sample(indices, min(GRID, len(indices)))
    return [tuple(index) for index in sorted(picked)]


@contextmanager
def _sheets(model: Any) -> Iterator[dict[tuple[Any, str], torch.Tensor]]:
    """Let the model's loaders fill sheets of integers, by layer and name of the parameter, instead of its parameters.

    As in vLLM's own reload the layers have the shapes of the checkpoint's format meanwhile, without memory.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

    sheets: dict[tuple[Any, str], torch.Tensor] = {}
    infos: list[tuple[Any, Any]] = []
    undo: list[Callable[[], None]] = []
    for layer in model.modules():
        info: Any = get_layerwise_info(layer)
        info.kernel_tensors = get_layer_params_buffers(layer)
        info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
        infos.append((layer, info))
        restore_layer_on_meta(layer, info)
        tensors: dict[str, Any] = get_layer_tensors(layer)
        for name, tensor in tensors.items():
            undo.append(_keep(tensor))
            tensor.weight_loader = _sheet_loader(sheets, layer, name, tensor)
    try:
        yield sheets
    finally:
        for restore in reversed(undo):
            restore()
        for layer, info in infos:
            _place_kernel_tensors(layer, info)
            info.reset()


def _keep(tensor: Any) -> Callable[[], None]:
    """Return a function that gives a tensor its loader back, and its values, which a few layers keep during a reload."""
    values = None if tensor.is_meta else tensor.detach().clone()
    attributes = dict(tensor.__dict__)

    def restore() -> None:
        tensor.__dict__.clear()
        tensor.__dict__.update(attributes)
        if values is not None:
            tensor.data.copy_(values)

    return restore


def _sheet_loader(
    sheets: dict[tuple[Any, str], torch.Tensor], layer: Any, name: str, tensor: Any
) -> Callable[..., Any]:
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader

    loader = _get_original_loader(tensor)
    signature = inspect.signature(loader)

    def load(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        sheet = sheets.get((layer, name))
        if sheet is None:
            # Pages of zeros take no memory before they are written.
            sheet = torch.zeros(tuple(tensor.shape), dtype=torch.int32)
            sheet.__class__ = tensor.__class__
            sheet.__dict__ = tensor.__dict__.copy()
            sheets[layer, name] = sheet
        bound.arguments["param"] = sheet
        return loader(*bound.args, **bound.kwargs)

    load.__name__ = "sheet_loader"
    return load


def held_values(model: Any, place: Place, dtype: torch.dtype) -> list[torch.Tensor]:
    """Read the values that this worker computes with at a place, (rows, columns) in float32, of each layer that uses the parameter.

    Args:
        dtype: that the engine computes in.

    Returns:
        Empty where the layer keeps its weights in a form not known here.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    module, columns = place.module, list(place.columns)
    if place.parameter == "weight" and isinstance(place.module, LinearBase) and len(place.shape) == 2:
        units = _units(module, columns, place.shape[1], getattr(module, "params_dtype", dtype))
        return [_plain(module.quant_method.apply(module, units).T[[row for (row,) in place.rows]])]
    if place.parameter == "weight" and isinstance(place.module, VocabParallelEmbedding):
        rows = [row for (row,) in place.rows]
        heads: list[Any] = [
            head
            for head in model.modules()
            if isinstance(head, ParallelLMHead) and (head is module or head.weight is module.weight)
        ]
        multiplied = [
            head.quant_method.apply(head, _units(head, columns, place.shape[1], dtype)).T[rows]
            for head in heads
        ]
        return [_plain(values) for values in (module.weight.detach()[rows][:, columns], *multiplied)]
    return _stored(place)


def _stored(place: Place) -> list[torch.Tensor]:
    """Read a parameter that is kept as it was loaded, or in an order that can be learnt."""
    stored = getattr(place.module, place.parameter, None)
    if not isinstance(stored, torch.Tensor):
        return []
    packing = _packing(place)
    if packing is None:
        if tuple(stored.shape) != place.shape:
            return []
        return [_plain(torch.stack([stored.detach()[row][list(place.columns)] for row in place.rows]))]
    width = place.shape[-1]
    values = [
        stored.detach()[expert].flatten()[packing[[row * width + column for column in place.columns]].long()]
        for expert, row in place.rows
    ]
    return [_plain(torch.stack(values))]


def _packing(place: Place) -> torch.Tensor | None:
    """Index in an expert's packed matrix of each element of the plain one; None if the layer packs nothing."""
    experts = _packing_experts(place.module)
    if experts is None or len(place.shape) != 3:
        return None
    kept: dict[str, torch.Tensor] = place.module.__dict__.setdefault("_expo_packing", {})
    if place.parameter not in kept:
        kept[place.parameter] = _learn_packing(place, experts)
    return kept[place.parameter]


def _learn_packing(place: Place, experts: Any) -> torch.Tensor:
    """Let the layer pack an expert whose weights are the numbers of their places: packing moves them and changes none."""
    layer, size = place.module, place.shape[1] * place.shape[2]
    dtype = getattr(layer, place.parameter).dtype
    # The labels are written into the bits of floats. Their two highest bits stay 0, so that none is NaN or infinite. A float of
    # 16 bits carries 14 bits of a label at a time, hence several passes.
    integers, bits = (torch.int32, 30) if dtype.itemsize == 4 else (torch.int16, 14)
    labels = torch.zeros(0)
    for shift in range(0, 30, bits):
        part = (torch.arange(1, size + 1, dtype=torch.int32) >> shift) & ((1 << bits) - 1)
        stand_in = torch.nn.Module()
        stand_in.__dict__.update(
            {name: value for name, value in layer.__dict__.items() if not name.startswith("_")}
        )
        for name, shape in _expert_shapes(layer).items():
            values = (
                part.to(integers).view(dtype).view(shape)
                if name == place.parameter
                else torch.zeros(shape, dtype=dtype)
            )
            stand_in.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
        experts.process_weights_after_loading(stand_in)
        packed = (
            getattr(stand_in, place.parameter).detach().contiguous().view(integers).flatten().to(torch.int32)
        )
        labels = packed << shift if shift == 0 else labels | (packed << shift)
    positions = torch.zeros(size, dtype=torch.int32)
    filled = labels > 0
    positions[(labels[filled] - 1).long()] = torch.arange(len(labels), dtype=torch.int32)[filled]
    return positions


def _expert_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of one expert's weights as the loader fills them."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    parameters, _ = get_layerwise_info(layer).restore_metadata
    return {
        name: (1, *tensor.shape[1:])
        for name, tensor in parameters.items()
        if name in {"w13_weight", "w2_weight"}
    }


def _packing_experts(layer: Any) -> Any:
    """The kernels of a layer of experts that packs weights for CPUs; None for any other layer."""
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None or not hasattr(layer, "w13_weight"):
        return None
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    return experts if isinstance(experts, CPUUnquantizedExperts) else None


def pack_experts_again() -> None:
    """Let reloads pack the experts of engines on CPUs, for all engines of this process.

    vLLM 0.29 packs them the first time only (`if not is_weight_update`): a reload left plain weights in packed storage, and
    log-probabilities were off by 3 to 6 nats.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original: Any = UnquantizedFusedMoEMethod._setup_kernel
    if hasattr(original, "expo_original"):
        return

    def set_up(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        experts = _packing_experts(layer) if again else None
        if experts is not None:
            experts.process_weights_after_loading(layer)

    set_up.expo_original = original  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = set_up  # type: ignore[method-assign]


def abandon_reload(model: Any) -> None:
    """Restore layers that an interrupted `reload_weights` has left empty, so that another reload may begin."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info: Any = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()


def repack_heads(model: torch.nn.Module) -> None:
    """Pack the output heads anew, after their weights have changed.

    On CPUs vLLM computes with a packed copy. `reload_weights` packs anew what it loads, and of tied weights it loads the embedding
    only: logprobs were off by 1.1 before this.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads: list[Any] = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    for head in heads:
        head.quant_method.process_weights_after_loading(head)


def _units(module: Any, columns: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """A unit vector for each column, as a layer takes its inputs."""
    units = torch.zeros(len(columns), width, dtype=dtype, device=module.weight.device)
    units[range(len(columns)), list(columns)] = 1
    return units


def _plain(values: torch.Tensor) -> torch.Tensor:
    return values.float().cpu()
