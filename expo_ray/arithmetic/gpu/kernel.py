"""The fused kernel as a `Kernel`: bytes to the GPU and back, through pinned buffers and a stream for each thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expo_ray.arithmetic.gpu.failures import gpu_failures
from expo_ray.arithmetic.gpu.fused import LEVELS, extrapolate_chunk
from expo_ray.arithmetic.gpu.launch import EXACT, WORDS, constants_of, rounded_alpha
from expo_ray.arithmetic.rule import Rule
from expo_ray.arithmetic.sums import TensorStatistics, statistics_from_sums
from expo_ray.checkpoint.tensors import DTYPE_BYTES


class GpuKernel:
    """`Kernel` of one rule on a GPU; on `cpu`, under Triton's interpreter, the same without pinned memory."""

    def __init__(self, rule: Rule, device: str) -> None:
        self._rule, self._device = rule, device
        self._constants = constants_of(rule)

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
        rule, size = self._rule, DTYPE_BYTES[self._rule.out_dtype]
        count = dpo.nbytes // DTYPE_BYTES[rule.dpo_dtype]
        assert sft.nbytes == count * DTYPE_BYTES[rule.sft_dtype]
        assert [out.nbytes for out in outs] == [count * size] * len(alphas)
        if count == 0:
            return statistics_from_sums(0, [0] * 5, [[0, 0] for _ in alphas])
        with gpu_failures():
            words, rows = self._compute(dpo, sft, count=count, alphas=alphas, key=key, first=first)
        for out, data in zip(outs, words, strict=True):
            np.frombuffer(out, np.uint8)[:] = data
        # Added one block after another, as the CPU does; `np.sum` adds pairwise, which gives other last digits.
        with np.errstate(over="ignore"):
            sums = np.add.accumulate(rows, axis=0)[-1]
        return statistics_from_sums(count, sums[:5], sums[5:].reshape(-1, 2))

    def _compute(
        self, dpo: memoryview, sft: memoryview, *, count: int, alphas: Sequence[float], key: int, first: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """The bytes of each output and the sums of each block, in buffers of this thread that its next chunk fills again."""
        rule, num = self._rule, len(alphas)
        blocks = (first + count - 1 >> LEVELS) - (first >> LEVELS) + 1
        lane = _lane_of_thread(self._device)
        kernel: Any = extrapolate_chunk
        factors = np.array([rounded_alpha(rule, alpha) for alpha in alphas])
        with torch.inference_mode(), lane.stream():
            parents = [
                lane.upload(name, data).view(WORDS[DTYPE_BYTES[dtype]])
                for name, data, dtype in (("dpo", dpo, rule.dpo_dtype), ("sft", sft, rule.sft_dtype))
            ]
            factor = lane.upload("alphas", factors.data.cast("B")).view(torch.float64)
            out = torch.empty(num * count, dtype=WORDS[DTYPE_BYTES[rule.out_dtype]], device=factor.device)
            sums = torch.empty(blocks * (5 + 2 * num), dtype=torch.float64, device=factor.device)
            kernel[(blocks,)](
                *parents, out, factor, sums, num, key, first, count, **self._constants, levels=LEVELS, **EXACT
            )
            words, rows = lane.download("outs", out), lane.download("sums", sums)
            lane.wait()
        return words.reshape(num, -1), rows.view(np.float64).reshape(blocks, -1)


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
        flat = data.view(torch.uint8)
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
