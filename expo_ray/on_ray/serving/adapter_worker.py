"""Adapters in the workers of an engine: the check of one that was loaded, and the products of adapters on CPUs.

Like `engine_adapter` this file knows private names of vLLM. Its own products for CPUs (vllm/lora/ops/torch_ops/lora_ops.py) copy A
and B once for each token of the batch, and look up a token without an adapter under -1, which is the last slot: sft would answer as
whatever alpha is there. Here the tokens of one adapter are multiplied together, and those without one are left alone. Data types
and the order of roundings are vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from expo_ray.on_ray.serving.swap import PairWorker


class AdapterWorker(PairWorker):
    """Methods that vLLM adds to each worker of an engine with adapters; those of `PairWorker` for one that merges after all."""

    if TYPE_CHECKING:  # vLLM's worker has it
        model_runner: Any

    def expo_check_adapter(self, number: int) -> dict[str, list[str]]:
        """Find what is wrong with a loaded adapter. vLLM passes over the layers that it does not know, without a word.

        Args:
            number: vLLM's, of the adapter.

        Returns:
            Names of layers that no module of this worker uses, under `unused`; of those whose scaled weights are no finite
            numbers in the engine's data type, under `overflowing`.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        layers = manager.get_adapter(number).loras
        return {
            "unused": sorted(layers.keys() - manager.modules.keys()),
            "overflowing": sorted(name for name, layer in layers.items() if not _is_finite(layer.lora_b)),
        }


def _is_finite(weights: Any) -> bool:
    """True if all elements are; layers that fuse several have a list, with None where the adapter has no part of it."""
    parts = weights if isinstance(weights, list) else [weights]
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)


def use_on_cpus() -> None:
    """Replace vLLM's products of adapters in this process; on GPUs, which have kernels of their own, nothing uses these."""
    from vllm.lora.punica_wrapper import punica_cpu

    products: dict[str, Callable[..., None]] = {
        "shrink": bgmv_shrink,
        "expand": bgmv_expand,
        "expand_slice": bgmv_expand_slice,
    }
    for name, product in products.items():
        assert hasattr(punica_cpu, f"bgmv_{name}")
        assert hasattr(punica_cpu, f"sgmv_{name}")
        setattr(punica_cpu, f"bgmv_{name}", product)
        setattr(punica_cpu, f"sgmv_{name}", _by_runs(product))


def bgmv_shrink(
    inputs: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, scaling: float = 1.0
) -> None:
    """Write `scaling * inputs @ A.T` into the first columns of `out`, with the A of each row's slot.

    Args:
        inputs: (rows, features).
        weights: A of each slot, (slots, 1, rank, features).
        out: (rows, at least rank), in the data type to compute in.
        slots: of each row; -1 where it has no adapter.
    """
    for slot, rows in _rows_by_slot(slots):
        product = inputs[rows].to(out.dtype) @ _matrix(weights, slot, out.dtype).T
        out[rows, : product.shape[1]] = scaling * product


def bgmv_expand(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Add `inputs @ B.T` to the first columns of `out`; see `bgmv_expand_slice`."""
    width = min(out.shape[1], weights.shape[-2])  # either may be padded
    bgmv_expand_slice(inputs, weights[..., :width, :], out, slots, 0, width, add_inputs)


def bgmv_expand_slice(  # noqa: PLR0917  # vLLM calls it so
    inputs: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Add `inputs @ B.T` to some columns of `out`, with the B of each row's slot, or write it there without `add_inputs`.

    Args:
        inputs: (rows, rank).
        weights: B of each slot, (slots, 1, `slice_size`, rank).
        out: (rows, features), in the data type to compute in.
        slots: of each row; -1 where it has no adapter.
        slice_offset: first of the `slice_size` columns.
    """
    columns = slice(slice_offset, slice_offset + slice_size)
    for slot, rows in _rows_by_slot(slots):
        product = inputs[rows].to(out.dtype) @ _matrix(weights, slot, out.dtype).T
        out[rows, columns] = out[rows, columns] + product if add_inputs else product


def _by_runs(product: Callable[..., None]) -> Callable[..., None]:
    """The same product for a batch that vLLM describes by runs of rows with one slot (`PunicaWrapperBase.prefill_metadata`)."""

    def by_runs(inputs: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, *arguments: Any) -> None:
        _, lengths, slots, _, _, _, *others = arguments
        product(inputs, weights, out, torch.repeat_interleave(slots, lengths), *others)

    return by_runs


def _rows_by_slot(slots: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slot that rows use, and those rows."""
    for slot in slots.unique().tolist():
        if slot >= 0:
            yield slot, (slots == slot).nonzero().flatten()


def _matrix(weights: torch.Tensor, slot: int, dtype: torch.dtype) -> torch.Tensor:
    return weights[slot].reshape(weights.shape[-2:]).to(dtype)


use_on_cpus()  # a worker imports this file before it makes its model
