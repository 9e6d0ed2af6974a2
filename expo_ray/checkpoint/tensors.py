"""What a checkpoint is, known from headers alone: names, dtypes, shapes and where the bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from expo_ray.storage.protocol import FileInfo

# safetensors' dtype names and the bytes of one element (format specification, "dtype" field).
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor.

    Attributes:
        dtype: safetensors' name, such as `BF16`.
        shape: row-major.
        file: key of the file that holds it.
        start: offset in bytes of its first element in that file (not in the data section).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights and side files, read from headers.

    Attributes:
        uri: the folder as the user named it.
        revision: commit of a Hub repository, else empty.
        config: `config.json`, parsed; empty for a bare adapter.
        tensors: by name, in the order they are stored: file by file, front to back.
        files: every weight file and side file, by key; pins what later reads must find.
        side_files: keys to copy byte for byte beside new weights.
        adapter: `adapter_config.json`, parsed, if the folder is a PEFT adapter, else empty.
        side_weights: those of `side_files` that hold weights, which are copied and not extrapolated.
        left_behind: keys of files that are neither weights nor side files, nor of a training run.
    """

    uri: str
    revision: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, FileInfo]
    side_files: tuple[str, ...] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    side_weights: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
