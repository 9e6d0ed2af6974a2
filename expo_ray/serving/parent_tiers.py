"""Choose where a worker keeps the parents between swaps: in the fastest memory that has room for them, or in their files."""

from __future__ import annotations

import torch

from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.step import Step
from expo_ray.serving.held_parents import MOST_TAKEN, HeldParents, NoRoom, size_of
from expo_ray.serving.host_memory import anonymous_memory, spare_bytes
from expo_ray.serving.pieces import Part, parts_of
from expo_ray.serving.slices import Pieces, Slices, StepSlices, tensors_of
from expo_ray.serving.weights import TORCH_DTYPES

GPU, PINNED, HOST, FILES = "GPU memory", "pinned host memory", "host memory", "files"
# What stays free on a card beside the parents: for layers that are loaded in another form than they are kept in, for example.
KEPT_ON_GPU = 2 << 30
_TRIED_OUT = Step(0.5)


def hold_parents(slices: Slices, workers: int, device: torch.device, *, whole_gpu: bool) -> str:
    """Copy both parents into memory, where there is room, so that swaps read no file.

    Args:
        workers: of this engine, which all do so at this time.
        device: that the engine computes on.
        whole_gpu: whether no other program is to use the GPU.

    Returns:
        For log and model card: where the parents are, with the reason if that is their files.
    """
    try:
        if device.type == "cpu":
            slices.hold(_in_host(slices, workers, slices.pieces), slices.pieces, StepSlices)
            return HOST
        return _hold_for_gpu(slices, workers, device, whole_gpu=whole_gpu)
    except (NoRoom, OSError, ImportError, RuntimeError) as error:  # the last is what CUDA raises
        slices.release()
        return f"{FILES}: {error}"


def release_if_short(slices: Slices) -> bool:
    """Free what parents take of the host's memory, if too little of it is left; returns True if they were freed."""
    held = slices.parents
    if not isinstance(held, HeldParents) or held.memory.device.type != "cpu" or spare_bytes() >= 0:
        return False
    slices.release()
    return True


def parts_in(slices: Slices, pieces: Pieces) -> list[tuple[TensorPlan, Part]]:
    """All parts of all pieces, in the order in which they are computed."""
    tensors = tensors_of(slices.plan)
    return [
        (tensors[name], part)
        for taken in pieces.values()
        for name, of_tensor in taken
        for piece in of_tensor
        for part in parts_of(tensors[name], piece)
    ]


def _in_host(slices: Slices, workers: int, pieces: Pieces) -> HeldParents:
    parts = parts_in(slices, pieces)
    size, spare = size_of(parts), max(0, spare_bytes())
    if size * workers > MOST_TAKEN * spare:
        raise NoRoom(
            f"in memory they take {size * workers / 1e9:.1f} GB, more than {MOST_TAKEN:g} of the {spare / 1e9:.1f} GB that can be spared"
        )
    held = HeldParents(parts, torch.from_numpy(anonymous_memory(size)))
    held.fill(slices.mapped, slices.threads)
    return held


def _hold_for_gpu(slices: Slices, workers: int, device: torch.device, *, whole_gpu: bool) -> str:
    from expo_ray.serving.gpu_slices import GPU_PIECE, GpuStepSlices

    pieces = slices.cut(GPU_PIECE)
    parts = parts_in(slices, pieces)
    size, (free, _) = size_of(parts), torch.cuda.mem_get_info(device)
    if whole_gpu and free - size >= KEPT_ON_GPU:
        where, held = GPU, HeldParents(parts, torch.empty(size, dtype=torch.uint8, device=device))
        held.fill(slices.mapped, slices.threads)
    else:
        where, held = PINNED, _in_host(slices, workers, pieces)
        held.pin()
    wanted = smallest_parameters(slices, torch.device("cpu"))
    slices.hold(held, pieces, GpuStepSlices)
    compare_on_gpu(wanted, slices, device)
    return where


def compare_on_gpu(wanted: dict[str, torch.Tensor], slices: Slices, device: torch.device) -> None:
    """Compare a few parameters that the GPU computes with those of the CPU.

    Raises:
        NoRoom: if they differ, or the GPU cannot compute them; it says so.
    """
    try:
        computed = smallest_parameters(slices, device)
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        raise NoRoom(f"the GPU cannot compute them: {type(error).__name__}: {error}") from error
    differing = [name for name, values in computed.items() if not same_bits(values.cpu(), wanted[name])]
    if differing:
        raise NoRoom(f"the GPU computes other bits than the CPU ({differing[0]})")


def same_bits(values: torch.Tensor, wanted: torch.Tensor) -> bool:
    """True if two tensors of one dtype and shape hold the same bytes."""
    words = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (values, wanted)]
    return torch.equal(*words)


def smallest_parameters(slices: Slices, device: torch.device) -> dict[str, torch.Tensor]:
    """Compute the smallest parameter of each number of dimensions, at some step."""
    smallest: dict[int, str] = {}
    for name, shape in slices.index_map.shapes.items():
        held = smallest.setdefault(len(shape), name)
        if torch.Size(shape).numel() < torch.Size(slices.index_map.shapes[held]).numel():
            smallest[len(shape)] = name
    tensors = tensors_of(slices.plan)
    dtypes = {
        name: TORCH_DTYPES[tensors[slices.index_map.by_parameter[name][0].tensor].dtype]
        for name in smallest.values()
    }
    outs = {
        name: torch.zeros(slices.index_map.shapes[name], dtype=dtype, device=device)
        for name, dtype in dtypes.items()
    }
    slices.at(_TRIED_OUT).fill(outs)
    return outs
