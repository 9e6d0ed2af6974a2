"""Find where the bytes of each tensor lie in a PyTorch zip file (`torch.save`), without reading the data.

The pickle is read by `torch.load(weights_only=True)` on fake tensors, which know the offset of their storage in the file
(https://docs.pytorch.org/docs/stable/notes/serialization.html). Weights then stream from the file as from safetensors; the
checksums that the zip format keeps of whole records are not compared.
"""

from __future__ import annotations

import io
import zipfile
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from expo_ray.checkpoint.tensors import DTYPE_BYTES, Tensor
from expo_ray.errors import CheckpointError, ExpoError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import shown

if TYPE_CHECKING:
    import torch
    from _typeshed import WriteableBuffer

_BLOCK_BYTES = 64 * 1024
_CACHED_BLOCKS = 64
_MAX_PICKLE_BYTES = 100_000_000
# Python's objects of a directory take ten times its size; 100,000 tensors need some 10 MB.
_MAX_DIRECTORY_BYTES = 16_000_000
# Beginnings of the lines in which PyTorch advises to load the file with code execution allowed.
_ADVICE = ("Weights only load failed", "(1)", "(2)", "Check the documentation", "Please file an issue")
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint16": "U16", "int16": "I16", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "int32": "I32",
    "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64",
}  # fmt: skip
# Bytes that PyTorch's zip writer puts between the data of a record and the next header: none, or a data descriptor of 16 or 24.
_DESCRIPTORS = (0, 16, 24)
_CONVERT = "convert it to safetensors (load and `save_pretrained` with transformers)"


class RangedFile(io.RawIOBase):
    """A stored object as a seekable read-only file: blocks of 64 KiB are read as needed, and the last 64 are kept."""

    def __init__(self, store: Store, info: FileInfo) -> None:
        super().__init__()
        self._store, self._info = store, info
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.most_bytes = _MAX_DIRECTORY_BYTES  # of a single read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        out = memoryview(buffer).cast("B")
        size = max(0, min(len(out), self._info.size - self._position))
        done = 0
        while done < size:
            number, skip = divmod(self._position + done, _BLOCK_BYTES)
            piece = self._block(number)[skip : skip + size - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        self._position += done
        return done

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._info.size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        # A hostile directory may ask for gigabytes in one piece.
        if wanted > self.most_bytes:
            raise CheckpointError(
                f"{self._store.uri}/{self._info.key}: its directory asks to read {wanted} bytes of header, more than "
                f"{self.most_bytes}; {_CONVERT}"
            )
        data = bytearray(wanted)
        self.readinto(data)
        return bytes(data)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * _BLOCK_BYTES
            data = bytearray(min(_BLOCK_BYTES, self._info.size - start))
            self._store.read_into(self._info.key, start, memoryview(data), etag=self._info.etag)
            self._blocks[number] = bytes(data)
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def read_torch_zip(store: Store, info: FileInfo) -> dict[str, Tensor]:
    """Read the tensors of a saved state dict by name, in the order of their bytes; their data is not read.

    Tensors that share storage are all listed, with the same or overlapping bytes.

    Raises:
        CheckpointError: if the file is not a zip file as PyTorch writes it, holds anything but dense tensors, or its pickle
            asks for code.
        StorageError: if the file cannot be read, or is no longer the one of `info`.
    """
    where = f"{store.uri}/{info.key}"
    file = RangedFile(store, info)
    magic = file.read(4)
    if magic != b"PK\x03\x04":
        kind = (
            "a Git LFS pointer; run `git lfs pull`"
            if magic == b"vers"
            else f"a file from before PyTorch 1.6; {_CONVERT}"
        )
        raise CheckpointError(f"{where}: not a zip file as PyTorch writes it, perhaps {kind}")
    directory = _read_directory(file, where)
    file.most_bytes = _MAX_PICKLE_BYTES
    state = _load(file, where)
    tensors = [_tensor(name, value, directory, info.key, where) for name, value in _items(state, where)]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.name))
    return {tensor.name: tensor for tensor in tensors}


class _Directory:
    """The records of a zip file in file order."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        self._starts = [record.header_offset for record in self.records]
        self._end = archive.start_dir

    def holds(self, start: int) -> int:
        """Size in bytes of the storage whose data begins at `start`, or -1 if none does."""
        place = bisect_right(self._starts, start) - 1
        if place < 0 or "/data/" not in self.records[place].filename:
            return -1
        record = self.records[place]
        following = self._starts[place + 1] if place + 1 < len(self._starts) else self._end
        header_end = record.header_offset + 30 + len(record.filename)
        if start < header_end or following - start - record.file_size not in _DESCRIPTORS:
            return -1
        return record.file_size


def _read_directory(file: RangedFile, where: str) -> _Directory:
    try:
        with zipfile.ZipFile(file) as archive:
            directory = _Directory(archive)
            _refuse_compressed(directory, where)  # before anything is read: few bytes may unpack to gigabytes
            # Other lengths are refused by PyTorch.
            orders = [
                archive.read(record)
                for record in directory.records
                if record.filename.endswith("/byteorder") and record.file_size <= len("little")
            ]
    except ExpoError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds on damaged files
        raise CheckpointError(
            f"{where}: damaged or truncated zip file ({error}); download it again"
        ) from error
    if any(order != b"little" for order in orders):
        raise CheckpointError(f"{where}: saved on a big-endian machine; {_CONVERT}")
    return directory


def _refuse_compressed(directory: _Directory, where: str) -> None:
    names = {record.filename for record in directory.records}
    packed = [record.filename for record in directory.records if record.compress_type != zipfile.ZIP_STORED]
    if packed or len(names) < len(directory.records):
        fault = f"{shown(packed[0])} is compressed" if packed else "a record stands in it twice"
        raise CheckpointError(f"{where}: not a zip file as PyTorch writes it ({fault}); {_CONVERT}")


def _load(file: RangedFile, where: str) -> Any:
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(
            f"{where}: reading it takes torch ({error}); pip install 'expo-ray[torch]', or {_CONVERT}"
        ) from error

    file.seek(0)
    try:
        with FakeTensorMode():
            return torch.load(file, weights_only=True)  # type: ignore[arg-type]  # read, readinto, seek, tell suffice
    except ExpoError:
        raise
    except Exception as error:  # the unpickler meets hostile input: anything can come out of it
        raise CheckpointError(
            f"{where}: refused by PyTorch's restricted unpickler, which runs no code ({type(error).__name__}: {_reason(error)}); "
            "convert it to safetensors if you trust where it comes from"
        ) from error


def _reason(error: Exception) -> str:
    """The reason that PyTorch gives, without its advice to load the file with code execution allowed."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_ADVICE)]
    reason = next((line for line in reasons if "Unpickler error" in line), reasons[0] if reasons else "")
    return shown(reason.partition(". Please use")[0])


def _items(state: Any, where: str) -> list[tuple[str, torch.Tensor]]:
    import torch

    if not isinstance(state, dict):
        raise CheckpointError(
            f"{where}: holds a {type(state).__name__}, not a state dict; save `model.state_dict()` alone"
        )
    for name, value in state.items():
        if isinstance(name, str) and (name == "__metadata__" or not _is_utf8(name)):
            raise CheckpointError(
                f"{where}: a tensor is named {shown(name)!r}, which no safetensors file can hold; rename it"
            )
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where}: {shown(repr(name))} is a {type(value).__name__}, not a tensor; save `model.state_dict()` alone"
            )
    return list(state.items())


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _tensor(name: str, value: torch.Tensor, directory: _Directory, file: str, where: str) -> Tensor:
    import torch

    here = f"{where}: tensor {shown(name)}"
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if value.layout != torch.strided or dtype is None:
        raise CheckpointError(
            f"{here}: {value.layout}, {value.dtype} is not a plain dense tensor; {_CONVERT}"
        )
    if not value.is_contiguous() or value.is_conj() or value.is_neg():
        raise CheckpointError(
            f"{here}: shape {list(value.shape)} with strides {list(value.stride())} is not contiguous; save "
            "`tensor.contiguous()`, or convert it to safetensors"
        )
    # A private name of PyTorch: `torch.load` sets it on the storages of fake tensors, as the offset in the file.
    storage_start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    size = -1 if storage_start is None else directory.holds(storage_start)
    begin = int(value.storage_offset()) * DTYPE_BYTES[dtype]
    tensor = Tensor(name, dtype, tuple(value.shape), file, (storage_start or 0) + begin)
    if not tensor.nbytes:
        return tensor
    if size < 0 or begin < 0 or begin + tensor.nbytes > size:
        raise CheckpointError(
            f"{here}: bytes {begin} to {begin + tensor.nbytes} of its storage are not where PyTorch would have written them "
            f"({max(size, 0)} bytes there); download it again, or convert it to safetensors"
        )
    return tensor
