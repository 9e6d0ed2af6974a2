"""Which tensor of a model goes into which file, and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.checkpoint.header import write_header
from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.checkpoint.weight_files import STEM
from expo_ray.extrapolation.match import TensorPlan


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file.

    Attributes:
        size: of the whole file in bytes.
    """

    file: str
    tensors: tuple[TensorPlan, ...]
    size: int

    @property
    def header(self) -> bytes:
        """What stands in front of the data: length and JSON of the safetensors format."""
        return _header(self.tensors)


def lay_out(tensors: Sequence[TensorPlan], shard_bytes: int, stem: str = STEM) -> tuple[ShardPlan, ...]:
    """Pack tensors in their order into files of at most `shard_bytes` of data, named as `transformers` does."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in tensors:
        size = _nbytes(plan)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(plan)
        filled += size
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    return tuple(map(_shard, names, groups))


def index_of(shards: Sequence[ShardPlan]) -> str:
    """Name of the index of several shards, as the library that loads them looks for it."""
    return re.sub(r"-\d+-of-\d+(?=\.)", "", shards[0].file) + ".index.json"


def _shard(file: str, tensors: Sequence[TensorPlan]) -> ShardPlan:
    # Wide dtypes first, so that every tensor starts at a multiple of its element's width, as readers that map files want.
    ordered = tuple(sorted(tensors, key=lambda plan: -DTYPE_BYTES[plan.dtype]))
    return ShardPlan(file, ordered, len(_header(ordered)) + sum(map(_nbytes, ordered)))


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    return write_header([(plan.name, plan.dtype, plan.shape) for plan in tensors])


def _nbytes(plan: TensorPlan) -> int:
    return plan.dpo.numel * DTYPE_BYTES[plan.dtype]
