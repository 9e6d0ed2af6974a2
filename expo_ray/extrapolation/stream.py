"""The pages of a shard, read and computed in a few threads and handed back in file order."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, TypeVar

from expo_ray.arithmetic.kernels import kernel_for
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.adapter import LoraLayer
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.extrapolation.pages import Chunk, Page, pages_of
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.storage import open_store

if TYPE_CHECKING:
    from expo_ray.arithmetic.low_rank import Float64, LowRank

# What is hashed and written at a time: each hand-over between threads costs, and a disk likes large writes.
PAGE_BYTES = 4 << 20
# The page buffers of one shard together stay below this, whatever the number of alphas.
BUFFER_BYTES = 64 << 20
# Pages that the caller may still be hashing or writing when it asks for the next one.
HELD = 2

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Computed:
    """One page of every output.

    Attributes:
        outs: the bytes to append to the output of each alpha; valid until `HELD` more pages have been asked for.
        statistics: by tensor, one for each alpha; none where dpo was kept.
    """

    outs: Sequence[memoryview]
    statistics: Sequence[tuple[str, Sequence[TensorStatistics]]]


def computed_pages(plan: PairPlan, index: int, alphas: Sequence[float], device: str) -> Iterator[Computed]:
    """Compute shard `index` for all `alphas` in one pass over both parents, its header included.

    A fixed number of pages exists at any time, so memory knows neither the tensor's size nor the shard's.
    """
    parents = _Parents(plan)
    window = parents.threads + 2 + HELD
    page_bytes = max(PAGE_BYTES, parents.chunk_bytes)
    while page_bytes * window * len(alphas) > BUFFER_BYTES and page_bytes > mmap.PAGESIZE:
        page_bytes //= 2
    slots = cycle([[_buffer(page_bytes) for _ in alphas] for _ in range(window)])
    pages = pages_of(plan.shards[index], page_bytes, min(parents.chunk_bytes, page_bytes))
    with ThreadPoolExecutor(parents.threads, "page") as pool:
        yield from _in_order(
            pool,
            lambda work: _compute(parents, *work, alphas, device),
            zip(pages, slots, strict=False),
            window - HELD,
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


def _buffer(size: int) -> memoryview:
    """Memory at the start of a page, so that a file can be written past the page cache."""
    return memoryview(mmap.mmap(-1, size))


class _Parents:
    """Both parents, opened for reading."""

    def __init__(self, plan: PairPlan) -> None:
        self.plan = plan
        self.stores = {plan.sft.uri: open_store(plan.sft.uri), plan.dpo.uri: open_store(plan.dpo.uri)}
        self.chunk_bytes = max(store.chunk_bytes for store in self.stores.values())
        self.threads = max(store.concurrency for store in self.stores.values())
        self.low_rank = lru_cache(maxsize=2)(self._load_low_rank)
        self._threads = threading.local()

    def read(self, checkpoint: Checkpoint, tensor: Tensor, first: int, out: memoryview) -> memoryview:
        """Fill `out` with the tensor's elements from `first` on, as stored."""
        etag = checkpoint.files[tensor.file].etag
        start = tensor.start + first * DTYPE_BYTES[tensor.dtype]
        self.stores[checkpoint.uri].read_into(tensor.file, start, out, etag=etag)
        return out

    def scratch(self, side: str, size: int) -> memoryview:
        """The same memory for every chunk of one thread, so that it stays in the processor's cache."""
        buffers: dict[str, memoryview] = self._threads.__dict__
        if side not in buffers or buffers[side].nbytes < size:
            buffers[side] = _buffer(max(size, self.chunk_bytes))
        return buffers[side][:size]

    def _load_low_rank(self, layer: LoraLayer) -> LowRank:
        from expo_ray.arithmetic.low_rank import LowRank

        a, b = (self._load(self.plan.dpo, tensor) for tensor in (layer.a, layer.b))
        return LowRank(a, b, layer)

    def _load(self, checkpoint: Checkpoint, tensor: Tensor) -> Float64:
        from expo_ray.arithmetic.low_rank import widen

        data = self.read(checkpoint, tensor, 0, memoryview(bytearray(tensor.nbytes)))
        return widen(data, tensor.dtype).reshape(tensor.shape)


def _compute(
    parents: _Parents, page: Page, slot: Sequence[memoryview], alphas: Sequence[float], device: str
) -> Computed:
    at = len(page.head)
    for out in slot:
        out[:at] = page.head
    statistics = []
    for chunk in page.chunks:
        outs = [out[at : at + chunk.out_bytes] for out in slot]
        statistics.append((chunk.plan.name, _compute_chunk(parents, chunk, outs, alphas, device)))
        at += chunk.out_bytes
    return Computed([out[:at] for out in slot], statistics)


def _compute_chunk(
    parents: _Parents, chunk: Chunk, outs: Sequence[memoryview], alphas: Sequence[float], device: str
) -> Sequence[TensorStatistics]:
    plan, first, count = chunk.plan, chunk.first, chunk.count
    if plan.lora is None and chunk.sft_first is None and plan.dtype == plan.dpo.dtype:
        parents.read(parents.plan.base, plan.dpo, first, outs[0])
        for out in outs[1:]:
            out[:] = outs[0]
        return ()
    kept = False
    scratch = parents.scratch("dpo", count * DTYPE_BYTES[plan.dpo.dtype])
    dpo = parents.read(parents.plan.base, plan.dpo, first, scratch)
    if plan.lora is not None:
        dpo, sft = parents.low_rank(plan.lora).merged(dpo, plan.dpo.dtype, first)
        rule = Rule("F64", "F64", plan.dtype, parents.plan.options.rounding)
    elif plan.sft is not None and chunk.sft_first is not None:
        scratch = parents.scratch("sft", count * DTYPE_BYTES[plan.sft.dtype])
        sft = parents.read(parents.plan.sft, plan.sft, chunk.sft_first, scratch)
        rule = Rule(plan.dpo.dtype, plan.sft.dtype, plan.dtype, parents.plan.options.rounding)
    else:  # dpo is kept, in another dtype
        kept, sft = True, dpo
        rule = Rule(plan.dpo.dtype, plan.dpo.dtype, plan.dtype, parents.plan.options.rounding)
    statistics = kernel_for(rule, device)(
        dpo, sft, outs,
        alphas=[0.0 if kept else alpha * plan.multiplier for alpha in alphas],
        key=random_key(parents.plan.options.seed, plan.random_name), first=first,
    )  # fmt: skip
    return () if kept else statistics
