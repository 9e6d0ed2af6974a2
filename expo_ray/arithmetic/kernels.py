"""The kernel of a rule on a device: the one place that knows which kernels there are."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from expo_ray.arithmetic.rule import Rule
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.errors import JobError


class Kernel(Protocol):
    """Computes one chunk of every output from one chunk of both parents. Runs without the GIL, in several threads at once."""

    def __call__(
        self,
        dpo: memoryview,
        sft: memoryview,
        outs: Sequence[memoryview],
        *,
        alphas: Sequence[float],
        key: int,
        first: int,
    ) -> list[TensorStatistics]:
        """Extrapolate a run of elements of one tensor.

        Args:
            dpo: contiguous little-endian elements of the rule's `dpo_dtype`; any alignment (an address that is no
                multiple of the element's size costs one more copy).
            sft: the same number of elements of the rule's `sft_dtype`.
            outs: one writable buffer per alpha, for the same number of elements of the rule's `out_dtype`.
            alphas: finite, >= -1.
            key: from `random_key`; used by `stochastic` alone.
            first: index within the tensor of the chunk's first element; chunks may begin and end anywhere.

        Returns:
            Statistics of each alpha. Sums do not depend on machine, device or threads. Sums over chunks are added in float64,
            so another division into chunks may change their last digits (not the counts, and never the weights).
        """


@functools.cache
def load_kernel(rule: Rule, device: str = "cpu") -> Kernel:
    """Load the kernel of a rule; the first on a machine compiles it and keeps the machine code.

    Args:
        device: `cpu` or `cuda`, as `resolve_device` returns it; both write the same bytes.
    """
    # Imported here because either costs 0.2 s and more, and neither is needed to plan or to read a manifest.
    if device == "cpu":
        from expo_ray.arithmetic.cpu.kernel import CpuKernel

        return CpuKernel(rule)
    from expo_ray.arithmetic.gpu.kernel import GpuKernel

    return GpuKernel(rule, device)


def resolve_device(device: str) -> str:
    """Choose where to compute. Torch is loaded for `cuda` alone, and only on a machine with an NVIDIA driver.

    Reading, sha256 and writing bound an extrapolation: one CPU core computes about three times as many elements a second as
    sha256 takes of one output. A GPU would add copies over a bus that is slower than the CPU's memory, so `auto` takes none.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Returns:
        `cpu` or `cuda`.

    Raises:
        JobError: if `cuda` is asked for and is unavailable or has no memory left, or the word is unknown.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise JobError(f"device: {device!r} is not known; choose `auto`, `cpu` or `cuda`")
    if device != "cuda":
        return "cpu"
    if obstacle := _obstacle_to_cuda():
        raise JobError(
            f"device: `cuda` was asked for, but {obstacle}; "
            "fix that, or choose `auto` or `cpu`: the result is the same, byte for byte"
        )
    _try_gpu()
    return "cuda"


@functools.cache
def _try_gpu() -> None:
    """Compute one element, so that a full card, an old driver or a missing compiler is reported before anything is written.

    Raises:
        JobError: if the GPU cannot; it names the remedy.
    """
    element = bytes(2)
    load_kernel(Rule("BF16", "BF16", "BF16", "nearest"), "cuda")(
        memoryview(element), memoryview(element), [memoryview(bytearray(2))], alphas=[0.5], key=0, first=0
    )


def _obstacle_to_cuda() -> str:
    """The reason why this machine cannot use a GPU; empty if it can."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1", "NoDevFiles"}:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU"
    driver = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the latter under WSL
    if not driver and shutil.which("nvidia-smi") is None:
        return "this machine has no NVIDIA driver (neither /dev/nvidia0 nor nvidia-smi)"
    return _obstacle_in_packages()


def _obstacle_in_packages() -> str:
    """The reason why torch or Triton cannot use the GPU; empty if they can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}; pip install 'expo-ray[torch]')"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU (see `nvidia-smi`)"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}; pip install 'expo-ray[torch]')"
    return ""
