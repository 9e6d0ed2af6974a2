"""Where the arithmetic runs, and the way to a GPU and back: pinned buffers and a stream for each thread."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from expo_ray.arithmetic.rule import Rule, statistics_from_sums
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.errors import JobError

if TYPE_CHECKING:
    import numpy as np
    import torch


def resolve_device(device: str) -> str:
    """Choose where to compute; torch is not loaded where no NVIDIA driver is found.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Returns:
        `cpu` or `cuda`.

    Raises:
        JobError: if `cuda` is asked for and cannot be had, or the word is unknown.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise JobError(f"device: {device!r} is not known; choose `auto`, `cpu` or `cuda`")
    obstacle = "" if device == "cpu" else _obstacle_to_cuda()
    if device == "cuda" and obstacle:
        raise JobError(
            f"device: `cuda` was asked for, but {obstacle}; "
            "mend that, or choose `auto` or `cpu`: the result is the same, byte for byte"
        )
    return "cpu" if device == "cpu" or obstacle else "cuda"


def _obstacle_to_cuda() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1", "NoDevFiles"}:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU"
    driver = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if not driver and shutil.which("nvidia-smi") is None:
        return "this machine has no NVIDIA driver (neither /dev/nvidia0 nor nvidia-smi)"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}; pip install 'expo-ray[torch]')"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no usable GPU (see `nvidia-smi`)"


class DeviceKernel:
    """`Kernel` of one rule on a torch device; `cpu` runs the same operations without pinned memory."""

    def __init__(self, rule: Rule, device: str) -> None:
        self._rule, self._device = rule, device

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
        import numpy as np
        import torch

        from expo_ray.arithmetic.gpu.unfused import extrapolate

        count = dpo.nbytes // DTYPE_BYTES[self._rule.dpo_dtype]
        assert sft.nbytes == count * DTYPE_BYTES[self._rule.sft_dtype]
        assert [out.nbytes for out in outs] == [count * DTYPE_BYTES[self._rule.out_dtype]] * len(alphas)
        lane = _lane_of_thread(self._device)
        with torch.inference_mode(), lane.stream():
            parents = [lane.upload(name, data) for name, data in (("dpo", dpo), ("sft", sft))]
            result = extrapolate(self._rule, *parents, alphas=alphas, key=key, first=first)
            words = [lane.download(f"out {k}", out) for k, out in enumerate(result.words)]
            counts, sums = lane.download("counts", result.counts), lane.download("sums", result.block_sums)
            lane.wait()
        for out, data in zip(outs, words, strict=True):
            np.frombuffer(out, np.uint8)[:] = data
        # Added in the order of the blocks, as `fused` does; `np.sum` would choose its own.
        with np.errstate(over="ignore"):
            totals = np.add.accumulate(sums.view(np.float64).reshape(-1, 2 + len(outs)), axis=0)[-1]
        num = counts.view(np.int64)
        return statistics_from_sums(
            count, [*num[:3], *totals[:2]], list(zip(num[3:], totals[2:], strict=True))
        )


class _Lane:
    """One thread's way to the device: its copies and kernels overlap with those of other threads."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._buffers: dict[str, torch.Tensor] = {}

    def stream(self) -> AbstractContextManager[object]:
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def upload(self, name: str, data: memoryview) -> torch.Tensor:
        import numpy as np

        host = self._buffer(name, data.nbytes)
        host.numpy()[:] = np.frombuffer(data, np.uint8)
        return host.to(self._device, non_blocking=True)

    def download(self, name: str, data: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The bytes of `data`, complete after `wait` and valid until the next chunk."""
        import torch

        flat = data.contiguous().view(-1).view(torch.uint8)
        host = self._buffer(name, flat.numel())
        host.copy_(flat, non_blocking=True)
        array: np.ndarray[tuple[int], np.dtype[np.uint8]] = host.numpy()
        return array

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        import torch

        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[name] = buffer
        return buffer[:size]


_lanes = threading.local()


def _lane_of_thread(device: str) -> _Lane:
    lanes: dict[str, _Lane] = _lanes.__dict__
    if device not in lanes:
        lanes[device] = _Lane(device)
    return lanes[device]
