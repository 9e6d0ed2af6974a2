"""Elements of both parents of a pair, kept in memory in the order in which a worker's parameters take them.

A swap then reads no file. Where there is a GPU it computes there, and reads the parents from its memory, or from pinned memory of
the host over the bus.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch

from expo_ray.checkpoint.tensors import DTYPE_BYTES
from expo_ray.extrapolation.match import TensorPlan
from expo_ray.serving.host_memory import pin, spare_bytes, unpin
from expo_ray.serving.mapped_parents import MappedParents, Side, stored_elements
from expo_ray.serving.pieces import Part

# Of the memory that could be taken when an engine starts, all of its workers on a node take no more for the parents.
MOST_TAKEN = 0.5
# Each part begins at a multiple of this, so that vectors of any processor are aligned.
_ALIGNMENT = 64
# Bytes that are copied between two looks at the memory that is left.
_BATCH = 256 << 20

Held = tuple[Side, TensorPlan, Part]


class NoRoom(Exception):
    """Memory is short."""


class HeldParents:
    """The parents' elements of one worker.

    Args:
        parts: that the worker computes, each with its tensor.
        memory: uint8, at least `size_of(parts)`, of the host or of a GPU.

    Attributes:
        memory: that holds them.
        is_pinned: whether it is locked in its place for a GPU.
    """

    is_pinned = False

    def __init__(self, parts: Sequence[tuple[TensorPlan, Part]], memory: torch.Tensor) -> None:
        self._parts, self.memory = parts, memory
        self._places = {
            (side, tensor.name, part): place for (side, tensor, part), place, _ in _laid_out(parts)
        }
        self._start = memory.data_ptr()

    def address(self, side: Side, tensor: TensorPlan, part: Part) -> int:
        return self._start + self._places[side, tensor.name, part]

    def elements(self, side: Side, tensor: TensorPlan, part: Part) -> torch.Tensor:
        """Bytes of a part's elements of one parent, where they are held."""
        place = self._places[side, tensor.name, part]
        return self.memory[place : place + _nbytes(side, tensor, part)]

    def fill(self, mapped: MappedParents, threads: Executor) -> None:
        """Copy the elements from the parents' files.

        Raises:
            NoRoom: if less of the host's memory is left than is still to be filled.
        """
        batch: list[Held] = []
        size, left = 0, self.memory.numel() if self.memory.device.type == "cpu" else 0
        for held, _, nbytes in _laid_out(self._parts):
            batch.append(held)
            size += nbytes
            if size >= _BATCH:
                _look(left)
                self._copy(batch, mapped, threads)
                batch, size, left = [], 0, max(0, left - size)
        _look(left)
        self._copy(batch, mapped, threads)

    def pin(self) -> None:
        """Lock the host's memory that holds them, so that a GPU reads it over the bus.

        Raises:
            OSError: if CUDA cannot.
        """
        pin(self.memory)
        self.is_pinned = True

    def close(self) -> None:
        """Give the memory up; it is freed once nothing refers to it."""
        if self.is_pinned:
            unpin(self.memory)
            self.is_pinned = False

    def _copy(self, batch: Sequence[Held], mapped: MappedParents, threads: Executor) -> None:
        def copy(held: Held) -> None:
            out, source = self.elements(*held), mapped.address(*held)
            if out.device.type == "cpu":
                ctypes.memmove(out.data_ptr(), source, out.numel())
            else:
                out.copy_(torch.from_numpy(bytes_at(source, out.numel())))

        for _ in threads.map(copy, batch):
            pass


def size_of(parts: Sequence[tuple[TensorPlan, Part]]) -> int:
    """Bytes that hold both parents' elements of some parts."""
    return sum(nbytes for _, _, nbytes in _laid_out(parts))


def _laid_out(parts: Sequence[tuple[TensorPlan, Part]]) -> Iterator[tuple[Held, int, int]]:
    """The elements of both parents one after another: each with its place, and with the bytes to the next."""
    place = 0
    for tensor, part in parts:
        sides: list[Side] = ["dpo"] if part.sft_first is None else ["dpo", "sft"]
        for side in sides:
            nbytes = -(-_nbytes(side, tensor, part) // _ALIGNMENT) * _ALIGNMENT
            yield (side, tensor, part), place, nbytes
            place += nbytes


def _nbytes(side: Side, tensor: TensorPlan, part: Part) -> int:
    stored, _ = stored_elements(side, tensor, part)
    return part.count * DTYPE_BYTES[stored.dtype]


def bytes_at(address: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes at an address, which have to outlive the result."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _look(left: int) -> None:
    if left and spare_bytes() < left:
        raise NoRoom(f"memory became short while {left / 1e9:.1f} GB were still to be filled")
