"""Elements of both parents of a pair, read where the operating system maps their files into memory."""

from __future__ import annotations

import mmap
import threading
from typing import Any, Literal, Protocol

import numpy as np

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.errors import InputChanged
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.serving.pieces import Part, Piece
from expo_ray.storage import open_store

Words = np.ndarray[Any, np.dtype[Any]]
Side = Literal["dpo", "sft"]


class ParentElements(Protocol):
    """Elements of both parents in the memory of the host."""

    def address(self, side: Side, tensor: TensorPlan, part: Part) -> int:
        """Address of a part's elements of one parent, one after the other, until the calling thread asks again."""


class MappedParents:
    """The weight files of both parents, mapped into memory.

    Long runs are used where the page cache holds them, without a copy; short ones are gathered first.

    A file that is cut short while it is read ends the process (SIGBUS), as for every program that maps files; the replica is then
    replaced. One that is replaced or rewritten is noticed before and after each use.

    Raises:
        InputChanged: if a parent is no longer the one that was planned.
    """

    def __init__(self, plan: PairPlan) -> None:
        self._parents: dict[Side, Checkpoint] = {"dpo": plan.base, "sft": plan.sft}
        self._maps: list[mmap.mmap] = []
        self._data: dict[tuple[str, str], Words] = {}
        self._buffers = threading.local()
        for parent in self._parents.values():
            for name in _weight_files(parent):
                path = open_store(parent.uri).local_path
                assert path is not None, parent.uri
                with (path / name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps.append(mapped)
                self._data[parent.uri, name] = np.frombuffer(mapped, np.uint8)
        self.check()

    def address(self, side: Side, tensor: TensorPlan, part: Part) -> int:
        stored, first = stored_elements(side, tensor, part)
        width = DTYPE_BYTES[stored.dtype]
        data = self._data[self._parents[side].uri, stored.file]
        start = stored.start + first * width
        if part.rows == 1 and (data.ctypes.data + start) % width == 0:
            return int(data.ctypes.data) + start
        scratch = self.scratch(side, part.count, width)
        gather(data[stored.start : stored.start + stored.nbytes], part, first, scratch)
        return int(scratch.ctypes.data)

    def scratch(self, use: str, count: int, width: int) -> Words:
        """Memory of the calling thread for `count` elements of `width` bytes; the next call for this use returns it again."""
        kept: dict[str, Words] = self._buffers.__dict__
        if use not in kept or kept[use].nbytes < count * width:
            kept[use] = np.empty(count * width, np.uint8)
        return kept[use][: count * width].view(f"V{width}")

    def check(self) -> None:
        """Check that the files are those that were planned.

        Raises:
            InputChanged: if one is not.
        """
        for parent in self._parents.values():
            store = open_store(parent.uri)
            for name in _weight_files(parent):
                if store.stat(name).etag != parent.files[name].etag:
                    raise InputChanged(f"{parent.uri}/{name} was replaced since it was planned; plan again")

    def close(self) -> None:
        """Give the files back."""
        self._data.clear()
        for mapped in self._maps:
            mapped.close()


def stored_elements(side: Side, tensor: TensorPlan, part: Part) -> tuple[Tensor, int]:
    """The tensor of a parent that a part is taken from, and the index there of the part's first element."""
    if side == "dpo":
        return tensor.base, part.first
    assert tensor.sft is not None
    assert part.sft_first is not None
    return tensor.sft, part.sft_first


def gather(data: Words, part: Part | Piece, first: int, out: Words) -> None:
    """Copy the rows of a part, which begins at element `first` of a tensor's bytes, one after the other into `out`."""
    width = out.dtype.itemsize
    elements = data[first * width : (first + (part.rows - 1) * part.pitch + part.run) * width].view(out.dtype)
    strides = (part.pitch * width, width)
    rows = np.lib.stride_tricks.as_strided(elements, (part.rows, part.run), strides, writeable=False)
    np.copyto(out.reshape(part.rows, part.run), rows)


def _weight_files(parent: Checkpoint) -> set[str]:
    return {tensor.file for tensor in parent.tensors.values()}
