"""Load the weights of a step into a running engine by slices: `reload_weights` without its loaders, which take whole tensors.

Like `engine_weights` this file knows private names of vLLM. What the loaders would do with each element is in the index map; what
vLLM does with a layer once its parameters are filled, such as packing them for a processor, is left to vLLM.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.serving.record_map import record_map
from expo_ray.serving.index_map import IndexMap
from expo_ray.serving.slices import Pending, StepSlices

_MOST_THREADS = 8


def map_of(plan: PairPlan, model: Any) -> IndexMap:
    """Record where a model of vLLM's holds each element of the pair's tensors."""
    return record_map(
        model,
        {tensor.name: (tensor.dtype, tensor.shape) for shard in plan.shards for tensor in shard.tensors},
    )


def obstacle_to_slices(plan: PairPlan, index_map: IndexMap, model: Any) -> str:
    """The reason why weights cannot be loaded by slices; empty if they can."""
    if plan.dpo.adapter:
        return "an adapter is merged into whole tensors"
    if index_map.obstacle:
        return index_map.obstacle
    for layer in _layers(model, index_map):
        for name, full_name in layer.names.items():
            held = getattr(layer.module, name)
            if not layer.is_processed and tuple(held.shape) != index_map.shapes[full_name]:
                return f"the engine keeps {full_name} in another form than its loader fills"
    return ""


def threads_of(workers: int) -> int:
    """Threads that one of the workers of an engine computes in."""
    return max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // workers))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch work in the calling thread alone.

    While other threads compute the next layer, a team of torch's waits for a processor at every layer that it packs: on two busy
    cores a swap of SmolLM2 took 1.05 s with two threads in a team, and 0.22 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@_one_thread()
def load_step(model: Any, computed: StepSlices, dtype: torch.dtype) -> None:
    """Load the weights of a step; the next layer is computed while the engine packs the one before.

    Args:
        dtype: that the engine computes in.

    Raises:
        ArithmeticFault: if the result holds NaN or infinities; the engine then holds a mixture, and can take another step.
        InputChanged: if a parent is no longer the one that was planned.
    """
    slices = computed.slices
    begun: deque[_Filling] = deque()
    try:
        for layer in _layers(model, slices.index_map):
            begun.append(layer.begin(computed))
            if len(begun) > 1:
                _finish(begun.popleft())
        while begun:
            _finish(begun.popleft())
    finally:
        for filling in begun:
            filling.abandon()
    computed.finish()
    _process_attention(model, dtype)


@dataclass(frozen=True)
class _Layer:
    """A layer with parameters of its own.

    Attributes:
        names: of its parameters and loaded buffers, and what the index map calls them.
    """

    module: Any
    names: Mapping[str, str]

    @property
    def is_processed(self) -> bool:
        """True if vLLM may keep its parameters in another form than they are loaded in. Heads are packed apart: `repack_heads`."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        method = getattr(self.module, "quant_method", None)
        return isinstance(method, QuantizeMethodBase) and not isinstance(self.module, VocabParallelEmbedding)

    def begin(self, computed: StepSlices) -> _Filling:
        """Begin to fill the parameters: in place, or in new memory if they are processed afterwards."""
        if self.is_processed:
            _materialise(self.module, self.names)
        targets: dict[str, torch.Tensor] = {name: getattr(self.module, name).data for name in self.names}
        outs = {
            name: target
            if target.is_contiguous() and (computed.on_gpu or target.device.type == "cpu")
            else torch.empty(
                tuple(target.shape), dtype=target.dtype, device=target.device if computed.on_gpu else "cpu"
            )
            for name, target in targets.items()
        }
        pending = computed.begin({self.names[name]: out for name, out in outs.items()})
        return _Filling(self, targets, outs, pending)


@dataclass(frozen=True)
class _Filling:
    """A layer whose parameters are being filled.

    Attributes:
        targets: the tensors to fill.
        outs: the same, or tensors that are computed where the targets cannot be, and copied to them.
    """

    layer: _Layer
    targets: Mapping[str, torch.Tensor]
    outs: Mapping[str, torch.Tensor]
    pending: Pending

    def abandon(self) -> None:
        """Stop filling, and give the layer its own parameters back."""
        self.pending.stop()
        if self.layer.is_processed:
            _restore(self.layer.module)


def _finish(filling: _Filling) -> None:
    """Wait until a layer is filled, and let vLLM process it."""
    try:
        filling.pending.wait()
        for name, target in filling.targets.items():
            if filling.outs[name] is not target:
                target.copy_(filling.outs[name])
        if filling.layer.is_processed:
            _process(filling.layer.module)
    except BaseException:
        filling.abandon()
        raise


def _layers(model: Any, index_map: IndexMap) -> Iterator[_Layer]:
    for prefix, module in model.named_modules():
        names = {
            name: full_name
            for name in (*module._parameters, *module._buffers)
            if (full_name := f"{prefix}.{name}" if prefix else name) in index_map.shapes
        }
        if names:
            yield _Layer(module, names)


def _materialise(module: Any, names: Mapping[str, str]) -> None:
    """Give a layer parameters of the shapes that a loader fills, with memory, and keep its own for `_process` or `_restore`."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

    info: Any = get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    restore_layer_on_meta(module, info)
    materialize_layer(module, info)
    for name, own in info.kernel_tensors[1].items():
        if name not in names and name in module._buffers and module._buffers[name].shape == own.shape:
            module._buffers[name].copy_(own)


def _process(module: Any) -> None:
    """Let vLLM process a filled layer as after loading, and put the result into the layer's own memory.

    As `_layerwise_process` of vLLM's reload: CUDA graphs and kernels keep the addresses of that memory.
    """
    from vllm.model_executor.model_loader.reload.layerwise import (
        _copy_and_restore_kernel_tensors,
        get_layerwise_info,
    )

    if hasattr(module, "_already_called_process_weights_after_loading"):
        delattr(module, "_already_called_process_weights_after_loading")
    module.quant_method.process_weights_after_loading(module)
    if hasattr(module, "update_param_tp_status"):
        module.update_param_tp_status()
    info: Any = get_layerwise_info(module)
    _copy_and_restore_kernel_tensors(module, info)
    info.reset()


def _restore(module: Any) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    info: Any = get_layerwise_info(module)
    if info.kernel_tensors is not None:
        _place_kernel_tensors(module, info)
        info.reset()


def _process_attention(model: Any, dtype: torch.dtype) -> None:
    """Let attention layers derive anew what they keep of other layers' weights, as those with latent keys do."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    for layer in model.modules():
        if is_deferred_attention_layer(layer):
            layer.process_weights_after_loading(dtype)
