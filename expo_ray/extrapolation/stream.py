"""The chunks of a shard, read and computed in a few threads and handed back in file order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import TypeVar

import numpy as np

from expo_ray.checkpoint.adapter import LoraLayer
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Checkpoint, Tensor
from expo_ray.extrapolation.arithmetic import Rule, kernel_for, random_key
from expo_ray.extrapolation.chunks import Chunk, chunks_of
from expo_ray.extrapolation.low_rank import Float64, LowRank, widen
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.statistics import TensorStatistics
from expo_ray.storage import open_store

# The chunk buffers of one shard together stay below this, whatever the number of alphas.
BUFFER_BYTES = 96 * 2**20

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Computed:
    """One chunk of every output.

    Attributes:
        outs: the bytes to append to the output of each alpha; valid until the next chunk is asked for.
        statistics: one for each alpha; empty where dpo was kept.
    """

    tensor: str
    outs: Sequence[memoryview]
    statistics: Sequence[TensorStatistics]


def computed_chunks(plan: PairPlan, index: int, alphas: Sequence[float], device: str) -> Iterator[Computed]:
    """Compute shard `index` for all `alphas` in one pass over both parents.

    At most `window` chunks exist at any time, so memory knows neither the tensor's size nor the shard's.
    """
    parents = _Parents(plan)
    window = min(parents.threads + 2, max(2, BUFFER_BYTES // (parents.chunk_bytes * (2 + len(alphas)))))
    slots = cycle([_Slot(parents.chunk_bytes, len(alphas)) for _ in range(window)])
    chunks = chunks_of(plan.shards[index], parents.chunk_bytes)
    with ThreadPoolExecutor(min(parents.threads, window), "chunk") as pool:
        yield from _in_order(
            pool,
            lambda work: _compute(parents, *work, alphas, device),
            zip(chunks, slots, strict=False),
            window,
        )


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """Results in the order of the items; fewer than `window` are begun and not yet consumed when one begins."""
    pending: deque[Future[R]] = deque()
    for item in items:
        if len(pending) == window:
            yield pending.popleft().result()
        pending.append(pool.submit(function, item))
    while pending:
        yield pending.popleft().result()


class _Slot:
    """The buffers of one chunk, used again and again."""

    def __init__(self, chunk_bytes: int, outputs: int) -> None:
        self.dpo, self.sft, *self.outs = (np.empty(chunk_bytes, np.uint8).data for _ in range(2 + outputs))


class _Parents:
    """Both parents, opened for reading."""

    def __init__(self, plan: PairPlan) -> None:
        self.plan = plan
        self.stores = {plan.sft.uri: open_store(plan.sft.uri), plan.dpo.uri: open_store(plan.dpo.uri)}
        self.chunk_bytes = max(store.chunk_bytes for store in self.stores.values())
        self.threads = max(store.concurrency for store in self.stores.values())
        self.low_rank = lru_cache(maxsize=2)(self._load_low_rank)

    def read(
        self, checkpoint: Checkpoint, tensor: Tensor, first: int, count: int, out: memoryview
    ) -> memoryview:
        """Elements `first` to `first + count` of a tensor, as stored, in the front of `out`."""
        width = DTYPE_BYTES[tensor.dtype]
        view = out[: count * width]
        etag = checkpoint.files[tensor.file].etag
        self.stores[checkpoint.uri].read_into(tensor.file, tensor.start + first * width, view, etag=etag)
        return view

    def _load_low_rank(self, layer: LoraLayer) -> LowRank:
        a, b = (self._load(self.plan.dpo, tensor) for tensor in (layer.a, layer.b))
        return LowRank(a, b, layer)

    def _load(self, checkpoint: Checkpoint, tensor: Tensor) -> Float64:
        data = self.read(checkpoint, tensor, 0, tensor.numel, memoryview(bytearray(tensor.nbytes)))
        return widen(data, tensor.dtype).reshape(tensor.shape)


def _compute(parents: _Parents, chunk: Chunk, slot: _Slot, alphas: Sequence[float], device: str) -> Computed:
    plan, first, count = chunk.plan, chunk.first, chunk.count
    dpo = parents.read(parents.plan.base, plan.dpo, first, count, slot.dpo)
    if plan.lora is None and chunk.sft_first is None and plan.dtype == plan.dpo.dtype:
        return Computed(plan.name, [dpo] * len(alphas), ())
    kept = False
    if plan.lora is not None:
        sft = widen(dpo, plan.dpo.dtype).data.cast("B")
        delta = parents.low_rank(plan.lora).delta(first, count)
        dpo = (np.frombuffer(sft, np.float64) + delta).data.cast("B")
        rule = Rule("F64", "F64", plan.dtype, parents.plan.options.rounding)
    elif plan.sft is not None and chunk.sft_first is not None:
        sft = parents.read(parents.plan.sft, plan.sft, chunk.sft_first, count, slot.sft)
        rule = Rule(plan.dpo.dtype, plan.sft.dtype, plan.dtype, parents.plan.options.rounding)
    else:  # dpo is kept, in another dtype
        kept, sft = True, dpo
        rule = Rule(plan.dpo.dtype, plan.dpo.dtype, plan.dtype, parents.plan.options.rounding)
    outs = [out[: chunk.out_bytes] for out in slot.outs]
    statistics = kernel_for(rule, device)(
        dpo, sft, outs,
        alphas=[0.0 if kept else alpha * plan.multiplier for alpha in alphas],
        key=random_key(parents.plan.options.seed, plan.random_name), first=first,
    )  # fmt: skip
    return Computed(plan.name, outs, () if kept else statistics)
