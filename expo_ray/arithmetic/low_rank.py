"""A LoRA delta as float64 chunks, so that merging an adapter is an extrapolation like any other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expo_ray.checkpoint.adapter import LoraLayer

Float64 = npt.NDArray[np.float64]


def widen(data: memoryview, dtype: str) -> Float64:
    """Raw weights (BF16, F16, F32 or F64) as float64, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(
        np.float64
    )


class LowRank:
    """The two factors of one layer, `delta = scale * B @ A`, multiplied out a few rows at a time.

    The products are exact in float64 and are added in the order of the ranks, so the result is the same for any chunk. A matrix
    product of a BLAS library adds in an order that depends on the processor and on the number of rows.
    """

    def __init__(self, a: Float64, b: Float64, layer: LoraLayer) -> None:
        left, right = (a.T, b.T) if layer.transposed else (b, a)
        self.left, self.right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        self.scale = layer.scale

    def delta(self, first: int, count: int) -> Float64:
        """Elements `first` to `first + count` of the flattened delta."""
        columns = self.right.shape[1]
        begin, end = first // columns, -(-(first + count) // columns)
        rows = np.zeros((end - begin, columns))
        for left, right in zip(self.left[begin:end].T, self.right, strict=True):
            rows += left[:, None] * right
        return self.scale * rows.reshape(-1)[first - begin * columns :][:count]

    def merged(self, base: memoryview, dtype: str, first: int) -> tuple[memoryview, memoryview]:
        """Elements `first` and following of the merged layer and of its base, both as float64, from the base's `dtype`."""
        sft = widen(base, dtype)
        dpo = sft + self.delta(first, sft.size)
        return dpo.data.cast("B"), sft.data.cast("B")
