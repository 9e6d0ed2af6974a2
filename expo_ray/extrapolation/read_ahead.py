"""Reads of a shard from stores that are asked over a network: few, large, and begun before they are needed.

A store counts requests. However small the pages are that a shard is computed in, parents are read in blocks of 8 MiB, each of which
feeds the chunks of several pages.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.extrapolation.layout import Chunk, Page
from expo_ray.extrapolation.reading import Reading
from expo_ray.storage import Store

BLOCK_BYTES = 8 << 20
# The largest chunk, which need not fit into a block that is nearly full: no chunk lies in two blocks.
CHUNK_BYTES = 1 << 20
# Blocks of both parents that are being read, waiting or in use: 63 MiB.
MOST_BLOCKS = 7


@dataclass(eq=False)
class _Block:
    """Consecutive bytes of a file, read with one request.

    Attributes:
        uses: chunks that need it and have not been computed.
        buffer: memory that holds the bytes once they are read.
        data: the bytes; None until reading has begun.
    """

    parent: Checkpoint
    file: str
    start: int
    end: int
    uses: int = 0
    buffer: memoryview | None = None
    data: Future[memoryview] | None = None

    def takes(self, file: str, start: int, end: int) -> bool:
        """True if these bytes can be read with the same request."""
        near = start <= self.end and end >= self.start
        length = max(self.end, end) - min(self.start, start)
        return self.data is None and self.file == file and near and length <= BLOCK_BYTES + CHUNK_BYTES


@dataclass(frozen=True)
class Piece:
    """The bytes of a chunk within a block."""

    block: _Block
    start: int
    end: int

    def view(self) -> memoryview:
        """Wait for the bytes; they stay until the piece is released."""
        assert self.block.data is not None, "begun before its page"
        return self.block.data.result()[self.start - self.block.start : self.end - self.block.start]


@dataclass(frozen=True)
class ReadPage:
    """A page and the bytes that its chunks need.

    Attributes:
        pieces: by chunk, of base and of sft; None for a parent that the chunk does not read, or that is not read ahead.
    """

    page: Page
    pieces: tuple[tuple[Piece | None, Piece | None], ...] = ()


@dataclass
class ReadAhead:
    """Reads blocks in a few threads, in the order in which pages need them, `MOST_BLOCKS` at a time.

    As a context manager it waits for its threads on the way out.

    Args:
        base, sft: the parents of the shard.
        stores: of the parents, by URI. A local one is not read ahead: the operating system does.
        reading: what is read is noted there.
    """

    base: Checkpoint
    sft: Checkpoint
    stores: Mapping[str, Store]
    reading: Reading
    _open: dict[str, _Block] = field(default_factory=dict)
    _held: int = 0
    _free: list[memoryview] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(MOST_BLOCKS, "read")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, pages: Iterable[Page]) -> Iterator[ReadPage]:
        """The pages in their order, as reading for them and for those that follow has begun."""
        waiting: deque[ReadPage] = deque()
        coming = iter(pages)
        while True:
            while not waiting or self._held < MOST_BLOCKS:
                page = next(coming, None)
                if page is None:
                    break
                waiting.append(ReadPage(page, tuple(map(self._pieces, page.chunks))))
            if not waiting:
                return
            first = waiting.popleft()
            for piece in (piece for pieces in first.pieces for piece in pieces if piece):
                self._begin(piece.block)  # one that is not full cannot wait for more
            yield first

    def release(self, pieces: Iterable[Piece | None]) -> None:
        """Take note that a chunk has been computed; a block that nothing needs any more makes room for another."""
        for block in (piece.block for piece in pieces if piece):
            with self._lock:
                block.uses -= 1
                if not block.uses and block.buffer is not None:
                    self._free.append(block.buffer)
                    self._held -= 1

    def _pieces(self, chunk: Chunk) -> tuple[Piece | None, Piece | None]:
        tensor = chunk.tensor
        base = self._piece(self.base, tensor.base, chunk.first, chunk.count)
        if tensor.low_rank is not None or tensor.sft is None or chunk.sft_first is None:
            return base, None
        return base, self._piece(self.sft, tensor.sft, chunk.sft_first, chunk.count)

    def _piece(self, parent: Checkpoint, tensor: Tensor, first: int, count: int) -> Piece | None:
        """Add the elements of a chunk to the block that is being filled, or to a new one."""
        if self.stores[parent.uri].local_path is not None:
            return None
        width = DTYPE_BYTES[tensor.dtype]
        start, end = tensor.start + first * width, tensor.start + (first + count) * width
        block = self._open.get(parent.uri)
        if block is None or not block.takes(tensor.file, start, end):
            if block is not None:
                self._begin(block)
            block = self._open[parent.uri] = _Block(parent, tensor.file, start, end)
            with self._lock:
                self._held += 1
        block.start, block.end = min(block.start, start), max(block.end, end)
        block.uses += 1
        if block.end - block.start >= BLOCK_BYTES:
            self._begin(block)
        return Piece(block, start, end)

    def _begin(self, block: _Block) -> None:
        """Read a block, unless that has begun."""
        if block.data is None:
            with self._lock:
                block.buffer = self._free.pop() if self._free else _buffer()
            block.data = self._pool.submit(self._fill, block, block.buffer)

    def _fill(self, block: _Block, buffer: memoryview) -> memoryview:
        view = buffer[: block.end - block.start]
        assert view.nbytes == block.end - block.start, "chunks are no larger than `CHUNK_BYTES`"
        self.reading.read_into(self.stores[block.parent.uri], block.parent, block.file, block.start, view)
        return view


def _buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, BLOCK_BYTES + CHUNK_BYTES))
