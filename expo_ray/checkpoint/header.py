"""Read and write the header of a safetensors file; a header that does not account for every byte of the file is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import shown
from expo_ray.untrusted import parse_json_object

# The limit of the safetensors library (MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000

# One request covers the header of nearly every file: 200 tensors need about 25 KB.
_FIRST_READ = 128 * 1024
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
_KEYS = {"dtype", "shape", "data_offsets"}
_WHITESPACE = b" \t\r\n"
_LFS_POINTER = b"version https://git-lfs"


def read_header(store: Store, info: FileInfo) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file by name, in the order of their bytes; one ranged read, rarely two.

    The format: 8 bytes of length N, little-endian; N bytes of JSON; the data, without overlaps, holes or a tail
    (https://github.com/huggingface/safetensors, "Format"). As the library does, this accepts white space around the JSON,
    unknown keys, and null for `__metadata__`. Unlike the library, it refuses duplicate names and shapes that another reader could
    overflow on.

    Raises:
        CheckpointError: if the header or the size of the file breaks the format.
        StorageError: if the file cannot be read, or is no longer the one of `info`.
    """
    where = f"{store.uri}/{info.key}"
    if info.size < 8:
        raise CheckpointError(
            f"{where}: truncated: {info.size} bytes, a safetensors file has at least 8; download it again"
        )
    head = _read(store, info, 0, min(info.size, _FIRST_READ))
    length = _header_length(head, info.size, where)
    if len(head) < 8 + length:
        head += _read(store, info, len(head), 8 + length - len(head))
    return _parse(bytes(head[8 : 8 + length]), info, where)


def write_header(tensors: Iterable[tuple[str, str, Iterable[int]]]) -> bytes:
    """Bytes that precede the data of a safetensors file: length and JSON, padded with spaces to 8 bytes.

    Args:
        tensors: (name, dtype, shape) in the order of their bytes, which follow each other without gaps. Readers map the file,
            so wide dtypes before narrow ones keep elements aligned.

    Returns:
        The same bytes for the same arguments; the data begins right behind them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in tensors:
        assert name not in header, name
        dimensions = list(shape)
        end = begin + prod(dimensions) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(store: Store, info: FileInfo, start: int, size: int) -> bytearray:
    data = bytearray(size)
    store.read_into(info.key, start, memoryview(data), etag=info.etag)
    return data


def _header_length(head: bytearray, size: int, where: str) -> int:
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{where}: a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull`"
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: its first 8 bytes announce a header of {length} bytes, the format allows {MAX_HEADER_BYTES}; this is "
            "no safetensors file or a damaged one, download it again"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{where}: truncated: the header alone needs {8 + length} bytes, the file has {size}; download it again"
        )
    return length


def _parse(text: bytes, info: FileInfo, where: str) -> dict[str, Tensor]:
    if not text.lstrip(_WHITESPACE).startswith(b"{"):
        raise CheckpointError(
            f"{where}: the header begins with {text[:8]!r} instead of '{{'; download it again"
        )
    entries = parse_json_object(text, f"{where}: header", most_bytes=MAX_HEADER_BYTES, strict=True)
    _check_metadata(entries.pop("__metadata__", None), where)
    data_start = 8 + len(text)
    placed = [_parse_entry(name, entry, data_start, info.key, where) for name, entry in entries.items()]
    placed.sort(key=lambda item: (item[0], item[1], item[2].name))
    _check_layout(placed, data_start, info.size, where)
    return {tensor.name: tensor for _, _, tensor in placed}


def _check_metadata(metadata: object, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{where}: `__metadata__` is {shown(metadata, 100)}, not an object; save the file again"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{where}: `__metadata__` has {key!r}: {shown(value, 100)}, where the format has strings; save the file again"
            )


def _parse_entry(name: str, entry: object, data_start: int, file: str, where: str) -> tuple[int, int, Tensor]:
    """Check one entry of the header; returns begin and end in the data section, and the tensor."""
    here = f"{where}: tensor {shown(name, 100)}"
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise CheckpointError(
            f"{here} is described by {shown(entry, 100)} instead of dtype, shape and data_offsets; save the file again"
        )
    dtype = _dtype(entry["dtype"], here)
    shape = _shape(entry["shape"], dtype, here)
    begin, end = _offsets(entry, here)
    tensor = Tensor(name, dtype, shape, file, data_start + begin)
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            f"{here}: {dtype} of shape {list(shape)} takes {tensor.nbytes} bytes, data_offsets {[begin, end]} are "
            f"{end - begin}; save or download the file again"
        )
    return begin, end, tensor


def _dtype(dtype: object, here: str) -> str:
    if dtype in _PACKED_DTYPES:
        raise CheckpointError(
            f"{here}: {dtype} is a quantised dtype; pass the checkpoint it was made from, in bf16, fp16 or fp32"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{here}: unknown dtype {shown(dtype, 100)}; save the checkpoint again with one of {', '.join(DTYPE_BYTES)}"
        )
    return dtype


def _shape(shape: object, dtype: str, here: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise CheckpointError(
            f"{here}: shape {shown(shape, 100)} is not a list of whole numbers from 0 to 2^63-1; save the file again"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{here}: {len(shape)} dimensions, at most {_MAX_DIMENSIONS} make sense; save the file again"
        )
    # Dimensions of 0 count as 1: other readers overflow on the product before they meet the 0.
    if prod(size or 1 for size in shape) * DTYPE_BYTES[dtype] > _MAX_SIZE:
        raise CheckpointError(
            f"{here}: shape {shown(shape, 100)} is larger than any memory; save the file again"
        )
    return tuple(shape)


def _offsets(entry: Mapping[str, Any], here: str) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(
            f"{here}: data_offsets {shown(offsets, 100)} are not two whole numbers from 0 to 2^63-1; save the file again"
        )
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{here}: data_offsets {offsets} end before they begin; save the file again")
    return begin, end


def _check_layout(placed: list[tuple[int, int, Tensor]], data_start: int, size: int, where: str) -> None:
    covered, previous = 0, "the header"
    for begin, end, tensor in placed:
        name = shown(tensor.name, 100)
        if begin != covered:
            fault = (
                f"bytes {covered} to {begin} belong to no tensor"
                if begin > covered
                else f"{name} overlaps it"
            )
            raise CheckpointError(
                f"{where}: tensor {name} begins at byte {begin} of the data, {previous} ends at {covered}: {fault}; "
                "save or download the file again"
            )
        covered, previous = end, name
    promised = data_start + covered
    if promised > size:
        raise CheckpointError(
            f"{where}: truncated: the header promises {promised} bytes, the file has {size}; download it again"
        )
    if promised < size:
        raise CheckpointError(
            f"{where}: the header promises {promised} bytes, the file has {size}: {size - promised} bytes past the last tensor; "
            "download it again"
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE
