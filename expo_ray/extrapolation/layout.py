"""Layout of the output: tensors in files, each file as pages, each page as chunks of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from expo_ray.checkpoint.header import write_header
from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.checkpoint.weight_files import STEM
from expo_ray.extrapolation.match import TensorPlan


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """An output file.

    Attributes:
        size: of the whole file in bytes.
    """

    file: str
    tensors: tuple[TensorPlan, ...]
    size: int

    @property
    def header(self) -> bytes:
        """Bytes in front of the data: length and JSON of the safetensors format."""
        return _header(self.tensors)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive elements of one tensor that one rule computes.

    Attributes:
        first: index of the first element within the tensor.
        count: number of elements.
        sft_first: index of the first element within sft's tensor, or None where dpo is kept.
    """

    tensor: TensorPlan
    first: int
    count: int
    sft_first: int | None

    @property
    def out_bytes(self) -> int:
        return self.count * DTYPE_BYTES[self.tensor.dtype]

    def split(self, count: int) -> tuple[Chunk, Chunk]:
        """The first `count` elements, and the others."""
        sft_first = None if self.sft_first is None else self.sft_first + count
        rest = replace(self, first=self.first + count, count=self.count - count, sft_first=sft_first)
        return replace(self, count=count), rest


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive bytes of an output file.

    Attributes:
        head: the part of the file's header that lies in this page, in front of the chunks.
    """

    head: bytes
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(chunk.out_bytes for chunk in self.chunks)


def lay_out(tensors: Sequence[TensorPlan], shard_bytes: int, stem: str = STEM) -> tuple[ShardPlan, ...]:
    """Pack tensors in their order into files of at most `shard_bytes` of data, named as `transformers` does."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        size = out_bytes(tensor)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    return tuple(map(_shard, names, groups))


def index_of(shards: Sequence[ShardPlan]) -> str:
    """Name of the index of several shards, as the library that loads them looks for it."""
    return re.sub(r"-\d+-of-\d+(?=\.)", "", shards[0].file) + ".index.json"


def pages_of(shard: ShardPlan, page_bytes: int, chunk_bytes: int) -> Iterator[Page]:
    """The whole file of a shard as pages, front to back.

    Args:
        page_bytes: size of every page but the last, as long as elements end there.
        chunk_bytes: no chunk needs a larger buffer, for its output or for either parent.
    """
    head, chunks, room = shard.header, list[Chunk](), page_bytes
    while len(head) > page_bytes:
        yield Page(head[:page_bytes], ())
        head = head[page_bytes:]
    room -= len(head)
    for run in _runs_of(shard):
        rest, (width, widest) = run, _widths(run.tensor)
        while rest.count:
            count = min(rest.count, max(1, chunk_bytes // widest), room // width)
            if count:
                chunk, rest = rest.split(count)
                chunks.append(chunk)
                room -= chunk.out_bytes
            else:
                yield Page(head, tuple(chunks))
                head, chunks, room = b"", [], max(page_bytes, width)
    yield Page(head, tuple(chunks))


def _shard(file: str, tensors: Sequence[TensorPlan]) -> ShardPlan:
    # Wide dtypes first, so that every tensor starts at a multiple of its element's width, as readers that map files want.
    ordered = tuple(sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))
    return ShardPlan(file, ordered, len(_header(ordered)) + sum(map(out_bytes, ordered)))


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    return write_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])


def out_bytes(tensor: TensorPlan) -> int:
    """Bytes of a whole output tensor."""
    return tensor.base.numel * DTYPE_BYTES[tensor.dtype]


def _runs_of(shard: ShardPlan) -> Iterator[Chunk]:
    """Elements in file order, as long as one rule computes them."""
    for tensor in shard.tensors:
        row = tensor.base.numel // tensor.shape[0] if tensor.runs else tensor.base.numel
        for run in tensor.runs or (RowRun(0, 0, 1),):
            sft_first = None if tensor.sft is None or run.sft_first is None else run.sft_first * row
            yield Chunk(tensor, run.dpo_first * row, run.count * row, sft_first)


def _widths(tensor: TensorPlan) -> tuple[int, int]:
    """Bytes of an element of the output, and of the widest of output and parents."""
    dtypes = (tensor.dtype, tensor.base.dtype, tensor.sft.dtype if tensor.sft else tensor.dtype)
    return DTYPE_BYTES[tensor.dtype], max(DTYPE_BYTES[dtype] for dtype in dtypes)
