"""Parameters computed by the GPU's kernel without a GPU: `python -m tests.support.gpu_slices_check FILE`, with Triton's interpreter.

FILE holds cases: a plan, an index map, a step, and the parameters that are expected. Ends with an AssertionError, or prints how many
elements it has compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step
from expo_ray.serving.gpu_slices import GPU_PIECE, GpuStepSlices
from expo_ray.serving.held_parents import HeldParents, NoRoom, size_of
from expo_ray.serving.index_map import IndexMap
from expo_ray.serving.parent_tiers import compare_on_gpu, parts_in, same_bits, smallest_parameters
from expo_ray.serving.slices import Slices

CPU = torch.device("cpu")


def check(plan: PairPlan, index_map: IndexMap, step: Step, expected: dict[str, torch.Tensor]) -> int:
    slices = Slices(plan, index_map, threads=1)
    wanted = smallest_parameters(slices, CPU)
    pieces = slices.cut(GPU_PIECE)
    parts = parts_in(slices, pieces)
    held = HeldParents(parts, torch.zeros(size_of(parts), dtype=torch.uint8))
    held.fill(slices.mapped, slices.threads)
    slices.hold(held, pieces, GpuStepSlices)
    outs = {name: torch.full_like(tensor, 77) for name, tensor in expected.items()}
    if len(outs) == 1:
        check_a_fault(slices, outs)
    slices.at(step).fill(outs)
    for name, tensor in outs.items():
        assert same_bits(tensor, expected[name]), name
    assert slices.work.elements >= sum(part.count for _, part in parts if part.sft_first is not None)
    compare_on_gpu(wanted, slices, CPU)
    held.memory.zero_()
    with pytest.raises(NoRoom, match="the GPU computes other bits than the CPU"):
        compare_on_gpu(wanted, slices, CPU)
    slices.close()
    return sum(tensor.numel() for tensor in outs.values())


def check_a_fault(slices: Slices, outs: dict[str, torch.Tensor]) -> None:
    """A step that overflows is refused, and leaves the parameters ready for another."""
    with pytest.raises(ArithmeticFault, match=r"at alpha 1e\+41: \d+ NaN, infinite or overflowing elements"):
        slices.at(Step(1e41)).fill(outs)


if __name__ == "__main__":
    np.seterr(all="ignore")
    cases = torch.load(Path(sys.argv[1]), weights_only=False)
    sys.stdout.write(f"{sum(check(*case) for case in cases)}\n")
