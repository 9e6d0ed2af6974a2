"""The pages of a shard, read and computed in a few threads and handed back in file order.

Threads, because reading, the kernels and hashing all release the GIL. File order, because sha256 and a local file take the bytes
front to back.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from expo_ray.arithmetic.kernels import load_kernel
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.checkpoint.adapter import LoraLayer
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.extrapolation.layout import Chunk, pages_of
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.read_ahead import CHUNK_BYTES, Piece, ReadAhead, ReadPage
from expo_ray.extrapolation.reading import Reading
from expo_ray.storage import open_planned

if TYPE_CHECKING:
    from expo_ray.arithmetic.low_rank import Float64, LowRank

# Hashed and written at a time: each hand-over between threads costs, and a disk likes large writes.
PAGE_BYTES = 4 << 20
# The page buffers of one shard together stay below this, whatever the number of alphas.
BUFFER_BYTES = 64 << 20
# Threads that compute where no parent is local; reading has its own.
_THREADS = 3
# Pages that the caller may still be hashing or writing when it asks for the next one.
HELD = 2

_Pieces = tuple[Piece | None, Piece | None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ComputedPage:
    """A computed page of every output.

    Attributes:
        outs: the bytes to append to the output of each alpha; valid until `HELD` more pages have been asked for.
        statistics: name of a tensor, and its statistics for each alpha; empty where dpo was kept.
    """

    outs: Sequence[memoryview]
    statistics: Sequence[tuple[str, Sequence[TensorStatistics]]]


def compute_pages(
    plan: PairPlan, index: int, alphas: Sequence[float], device: str, reading: Reading | None = None
) -> Iterator[ComputedPage]:
    """Compute shard `index` for all `alphas` in one pass over both parents, its header included.

    A fixed number of pages exists at any time, so memory does not grow with the tensor's or the shard's size.

    Args:
        reading: takes note of what is read from parents that are not local.
    """
    with _Parents(plan, reading or Reading()) as parents:
        # Two pages more than threads, so that none waits while the caller takes a page that was finished out of order.
        window = parents.threads + 2 + HELD
        page_bytes = max(PAGE_BYTES if parents.any_local else PAGE_BYTES // 2, parents.chunk_bytes)
        while page_bytes * window * len(alphas) > BUFFER_BYTES and page_bytes > mmap.PAGESIZE:
            page_bytes //= 2
        # A slot is filled again only after `window` pages, when the caller has let go of what it held: `_in_order` begins a page
        # only while fewer than `window - HELD` are pending, and the caller keeps at most `HELD`.
        slots = cycle([[_buffer(page_bytes) for _ in alphas] for _ in range(window)])
        pages = parents.ahead.read(
            pages_of(plan.shards[index], page_bytes, min(parents.chunk_bytes, page_bytes))
        )

        def compute(work: tuple[ReadPage, Sequence[memoryview]]) -> ComputedPage:
            return _compute_page(parents, *work, alphas, device)

        with ThreadPoolExecutor(parents.threads, "page") as pool:
            yield from _in_order(pool, compute, zip(pages, slots, strict=False), window - HELD)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """Results in the order of the items. An item is begun while fewer than `window` are begun and not yet consumed."""
    pending: deque[Future[R]] = deque()
    for item in items:
        if len(pending) == window:
            yield pending.popleft().result()
        pending.append(pool.submit(function, item))
    while pending:
        yield pending.popleft().result()


def _buffer(size: int) -> memoryview:
    """Memory that begins at a memory page: O_DIRECT, which writes past the page cache, takes no other."""
    return memoryview(mmap.mmap(-1, size))


class _Parents:
    """Both parents, opened for reading.

    As a context manager it waits for what is being read on the way out.
    """

    # Layers whose factors are kept: threads at the border of two layers need both.
    _KEPT_LAYERS = 2

    def __init__(self, plan: PairPlan, reading: Reading) -> None:
        self.plan = plan
        self.stores = {parent.uri: open_planned(parent.uri, parent.files) for parent in (plan.sft, plan.dpo)}
        local = [store for store in self.stores.values() if store.local_path is not None]
        # Blocks that are read ahead must reach further than the pages that are begun.
        self.any_local = bool(local)
        self.chunk_bytes = max((store.chunk_bytes for store in local), default=CHUNK_BYTES)
        self.threads = max((store.concurrency for store in local), default=_THREADS)
        self.ahead = ReadAhead(plan.base, plan.sft, self.stores, reading)
        self.low_rank = lru_cache(maxsize=self._KEPT_LAYERS)(self._load_low_rank)
        self._threads = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ahead.__exit__(kind, error, trace)

    def read(
        self, checkpoint: Checkpoint, tensor: Tensor, first: int, piece: Piece | None, out: memoryview
    ) -> memoryview:
        """The tensor's elements from `first` on, as stored: those that were read ahead, or `out` filled with them."""
        if piece is not None:
            return piece.view()
        etag = checkpoint.files[tensor.file].etag
        start = tensor.start + first * DTYPE_BYTES[tensor.dtype]
        self.stores[checkpoint.uri].read_into(tensor.file, start, out, etag=etag)
        return out

    def scratch(self, side: str, size: int) -> memoryview:
        """Memory of the calling thread, the same for every chunk, so that it stays in the processor's cache."""
        buffers: dict[str, memoryview] = self._threads.__dict__
        if side not in buffers or buffers[side].nbytes < size:
            buffers[side] = _buffer(max(size, self.chunk_bytes))
        return buffers[side][:size]

    def _load_low_rank(self, layer: LoraLayer) -> LowRank:
        from expo_ray.arithmetic.low_rank import LowRank

        return LowRank(self._load_factor(layer.a), self._load_factor(layer.b), layer)

    def _load_factor(self, tensor: Tensor) -> Float64:
        from expo_ray.arithmetic.low_rank import widen

        data = self.read(self.plan.dpo, tensor, 0, None, memoryview(bytearray(tensor.nbytes)))
        return widen(data, tensor.dtype).reshape(tensor.shape)


def _compute_page(
    parents: _Parents, read: ReadPage, slot: Sequence[memoryview], alphas: Sequence[float], device: str
) -> ComputedPage:
    """Fill `slot`, a buffer for each alpha, with a page of every output."""
    page = read.page
    start = len(page.head)
    for out in slot:
        out[:start] = page.head
    statistics = []
    for chunk, pieces in zip(page.chunks, read.pieces, strict=True):
        outs = [out[start : start + chunk.out_bytes] for out in slot]
        statistics.append(
            (chunk.tensor.name, _compute_chunk(parents, chunk, pieces, outs, alphas, device=device))
        )
        parents.ahead.release(pieces)
        start += chunk.out_bytes
    return ComputedPage([out[:start] for out in slot], statistics)


def _compute_chunk(
    parents: _Parents,
    chunk: Chunk,
    pieces: _Pieces,
    outs: Sequence[memoryview],
    alphas: Sequence[float],
    *,
    device: str,
) -> Sequence[TensorStatistics]:
    """Fill `outs`, a buffer for each alpha; returns the statistics, none where dpo is kept."""
    tensor, first, options = chunk.tensor, chunk.first, parents.plan.options
    kept = tensor.low_rank is None and chunk.sft_first is None
    if kept and tensor.dtype == tensor.base.dtype:
        data = parents.read(parents.plan.base, tensor.base, first, pieces[0], outs[0])
        for out in outs[0 if pieces[0] else 1 :]:
            out[:] = data
        return ()
    dpo, sft, rule = _operands(parents, chunk, pieces)
    statistics = load_kernel(rule, device)(
        dpo, sft, outs,
        alphas=[0.0 if kept else alpha * tensor.multiplier for alpha in alphas],
        key=random_key(options.seed, tensor.random_name), first=first,
    )  # fmt: skip
    return () if kept else statistics


def _operands(parents: _Parents, chunk: Chunk, pieces: _Pieces) -> tuple[memoryview, memoryview, Rule]:
    """Read a chunk of both parents; the same elements twice where dpo is kept and only its dtype changes."""
    tensor, rounding = chunk.tensor, parents.plan.options.rounding
    scratch = parents.scratch("base", chunk.count * DTYPE_BYTES[tensor.base.dtype])
    base = parents.read(parents.plan.base, tensor.base, chunk.first, pieces[0], scratch)
    if tensor.low_rank is not None:  # the base is sft, and dpo is sft with the adapter merged
        dpo, sft = parents.low_rank(tensor.low_rank).merged(base, tensor.base.dtype, chunk.first)
        return dpo, sft, Rule("F64", "F64", tensor.dtype, rounding)
    if tensor.sft is None or chunk.sft_first is None:
        return base, base, Rule(tensor.base.dtype, tensor.base.dtype, tensor.dtype, rounding)
    scratch = parents.scratch("sft", chunk.count * DTYPE_BYTES[tensor.sft.dtype])
    sft = parents.read(parents.plan.sft, tensor.sft, chunk.sft_first, pieces[1], scratch)
    return base, sft, Rule(tensor.base.dtype, tensor.sft.dtype, tensor.dtype, rounding)
