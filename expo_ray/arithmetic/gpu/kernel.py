"""The kernel of a torch device: bytes to the GPU and back, through pinned buffers and a stream for each thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from expo_ray.arithmetic.gpu.operations import extrapolate
from expo_ray.arithmetic.rule import Rule
from expo_ray.arithmetic.sums import TensorStatistics, statistics_from_sums
from expo_ray.checkpoint.tensors import DTYPE_BYTES


class TorchKernel:
    """`Kernel` of one rule on a torch device; on `cpu`, which tests use, it runs the same operations without pinned memory."""

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
        # Added one block after another, as the CPU does; `np.sum` adds pairwise, which gives other last digits.
        with np.errstate(over="ignore"):
            totals = np.add.accumulate(sums.view(np.float64).reshape(-1, 2 + len(outs)), axis=0)[-1]
        num = counts.view(np.int64)
        return statistics_from_sums(
            count, [*num[:3], *totals[:2]], list(zip(num[3:], totals[2:], strict=True))
        )


class _Lane:
    """A thread's stream and pinned buffers: its copies and operations overlap with those of other threads."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._buffers: dict[str, torch.Tensor] = {}

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def upload(self, name: str, data: memoryview) -> torch.Tensor:
        """Copy bytes into the pinned buffer `name` and queue their copy to the device."""
        host = self._buffer(name, data.nbytes)
        host.numpy()[:] = np.frombuffer(data, np.uint8)
        return host.to(self._device, non_blocking=True)

    def download(self, name: str, data: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Queue the copy of `data` into the pinned buffer `name`; complete after `wait` and valid until the next chunk."""
        flat = data.contiguous().view(-1).view(torch.uint8)
        host = self._buffer(name, flat.numel())
        host.copy_(flat, non_blocking=True)
        array: npt.NDArray[np.uint8] = host.numpy()
        return array

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        # Kept for the thread's next chunk: allocating page-locked memory synchronises the device (CUDA programming guide,
        # "Implicit Synchronization").
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
