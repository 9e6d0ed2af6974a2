"""Compare the tensors that are kept as dpo has them with sft's: what differs there is worth a note."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from expo_ray.storage import Store, open_store
from expo_ray.text import first_few, shown

# Constants are small, and a large one that differs does so at its beginning. Planning reads no more than this of any.
_MOST_BYTES = 64 << 10
_MOST_TENSORS = 1024
_THREADS = 16


def differing(sft: Checkpoint, dpo: Checkpoint, kept: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Those of dpo's kept tensors that are not sft's: of another dtype or shape, or with another value at the beginning."""
    alike = [pair for pair in kept if _form(pair[0]) == _form(pair[1])][:_MOST_TENSORS]
    others = {mine.name for mine, other in kept if _form(mine) != _form(other)}
    if alike:
        differs = partial(_differs, open_store(dpo.uri), open_store(sft.uri), dpo, sft)
        with ThreadPoolExecutor(_THREADS, "kept") as pool:
            results = list(pool.map(differs, alike))
        others |= {mine.name for (mine, _), is_other in zip(alike, results, strict=True) if is_other}
    return [mine for mine, _ in kept if mine.name in others]


def notes_on(tensors: Sequence[Tensor]) -> list[str]:
    """What to tell of kept tensors that differ between the parents."""
    constants = [shown(tensor.name) for tensor in tensors if is_constant(tensor)]
    others = [shown(tensor.name) for tensor in tensors if not is_constant(tensor)]
    notes = []
    if constants:
        notes.append(
            f"{len(constants)} constant(s) and running statistics differ between sft and dpo and are kept as dpo has them: "
            f"{first_few(constants)}"
        )
    if others:
        notes.append(
            f"{len(others)} tensor(s) that are no floating-point weights differ between sft and dpo and are kept as dpo has "
            f"them: {first_few(others)}"
        )
    return notes


def are_weights(tensors: Sequence[Tensor]) -> bool:
    """True if any of them is of a dtype that weights have, so that it could have been extrapolated."""
    return any(tensor.dtype in WEIGHT_DTYPES for tensor in tensors)


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _differs(
    dpo_store: Store, sft_store: Store, dpo: Checkpoint, sft: Checkpoint, pair: tuple[Tensor, Tensor]
) -> bool:
    mine, other = pair
    size = min(mine.nbytes, _MOST_BYTES)
    return _beginning(dpo_store, dpo, mine, size) != _beginning(sft_store, sft, other, size)


def _beginning(store: Store, checkpoint: Checkpoint, tensor: Tensor, size: int) -> bytes:
    data = bytearray(size)
    if size:
        store.read_into(tensor.file, tensor.start, memoryview(data), etag=checkpoint.files[tensor.file].etag)
    return bytes(data)
