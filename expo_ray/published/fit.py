"""Find the alpha of any extrapolated model, also of another tool's: a least-squares fit of each weight to its two parents."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from expo_ray.arithmetic.low_rank import Float64, widen
from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.checkpoint.renaming import match_names
from expo_ray.checkpoint.tensors import DTYPE_BYTES, WEIGHT_DTYPES, Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.checkpoint.vocabulary import differing_rows, read_vocabulary
from expo_ray.errors import CheckpointError
from expo_ray.storage import open_store
from expo_ray.text import first_few

_THREADS = 4
_ELEMENTS = 2**17


@dataclass(frozen=True)
class Fit:
    """The best approximation of a tensor as `dpo + alpha * (dpo - sft)`.

    Attributes:
        alpha: least-squares solution; 0 where sft equals dpo.
        delta_square: sum of (dpo - sft)^2, the weight of this tensor in a mean of alphas.
        relative_delta: RMS(dpo - sft) / RMS(dpo).
        residual: RMS(model - dpo - alpha * (dpo - sft)) / RMS(dpo).
    """

    name: str
    alpha: float
    delta_square: float
    relative_delta: float
    residual: float


def fit_alphas(
    model: str, sft: str, dpo: str, *, allow_pickle: bool = False, by_token: bool = False
) -> tuple[list[Fit], list[str]]:
    """Read a model and its parents, and fit an alpha to each weight.

    Elements are compared by position.

    Args:
        by_token: the rows of the vocabulary were matched by token. If the tokenizers of the parents give a token different rows,
            embedding and head are not compared.

    Returns:
        The fits, in the model's order, and a line for each tensor that could not be compared, with the reason.

    Raises:
        CheckpointError: if one of the folders cannot be read, or nothing can be compared.
        Problems: if several things are wrong with a folder.
    """
    made, *parents = (
        read_checkpoint(open_store(uri), allow_pickle=allow_pickle) for uri in (model, sft, dpo)
    )
    sides = [_Side(made), *(_Side(_with_names_of(made, parent)) for parent in parents)]
    names = [
        name
        for name, tensor in sides[0].checkpoint.tensors.items()
        if tensor.dtype in WEIGHT_DTYPES and not is_constant(tensor)
    ]
    has_moved_rows = by_token and _has_moved_rows(sides[1].checkpoint, sides[2].checkpoint)
    same: dict[str, list[Tensor]] = {}
    skipped: list[str] = []
    for name in names:
        candidates = [side.find(name) for side in sides]
        tensors = [tensor for tensor in candidates if tensor and tensor.dtype in WEIGHT_DTYPES]
        if len(tensors) < len(sides) or len({tensor.shape for tensor in tensors}) > 1:
            skipped.append(f"{name} ({_shapes(candidates)})")
        elif has_moved_rows and sides[2].vocabulary.is_vocabulary(name):
            skipped.append(f"{name} (its rows were matched by token, not by position)")
        else:
            same[name] = tensors
    lacking = [name for name in sides[2].checkpoint.tensors if sides[0].find(name) is None]
    if not same:
        raise CheckpointError(
            f"{model} shares no weight of one shape with both parents ({first_few(skipped, 3)}); name whole models of one "
            "architecture, not adapters"
        )
    with ThreadPoolExecutor(_THREADS, "fit") as pool:
        fits = list(pool.map(lambda item: _fit(item[0], sides, item[1]), same.items()))
    return fits, skipped + [f"{name} (not in the model)" for name in lacking]


def _has_moved_rows(sft: Checkpoint, dpo: Checkpoint) -> bool:
    """True if the tokenizers of two parents give a row of the vocabulary different tokens; reads both vocabularies."""
    dpo_vocab, sft_vocab = (read_vocabulary(open_store(parent.uri), parent) for parent in (dpo, sft))
    return bool(differing_rows(dpo_vocab, sft_vocab, VocabularyWeights(dpo).rows))


def _with_names_of(model: Checkpoint, parent: Checkpoint) -> Checkpoint:
    """`parent` with the names that `model` has for its tensors, where the two differ."""
    names = match_names(parent.tensors, model.tensors)
    return replace(parent, tensors={names.get(name, name): tensor for name, tensor in parent.tensors.items()})


class _Side:
    """A model of the three that are compared, with access to its values."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._store = open_store(checkpoint.uri)
        self.vocabulary = VocabularyWeights(checkpoint)

    def find(self, name: str) -> Tensor | None:
        """The weight of that name; for a tied head, the embedding that holds it."""
        return self.vocabulary.tensor(name)

    def read(self, tensor: Tensor, first: int, count: int) -> Float64:
        width = DTYPE_BYTES[tensor.dtype]
        data = memoryview(bytearray(count * width))
        etag = self.checkpoint.files[tensor.file].etag
        self._store.read_into(tensor.file, tensor.start + first * width, data, etag=etag)
        return widen(data, tensor.dtype)


def _shapes(tensors: Sequence[Tensor | None]) -> str:
    return ", ".join(
        f"{side} {list(tensor.shape) if tensor else 'has none'}"
        for side, tensor in zip(("model", "sft", "dpo"), tensors, strict=True)
    )


def _fit(name: str, sides: Sequence[_Side], tensors: Sequence[Tensor]) -> Fit:
    sums = np.zeros(4)
    size = tensors[0].numel
    for first in range(0, size, _ELEMENTS):
        count = min(_ELEMENTS, size - first)
        model, sft, dpo = (
            side.read(tensor, first, count) for side, tensor in zip(sides, tensors, strict=True)
        )
        delta, moved = dpo - sft, model - dpo
        sums += delta @ delta, delta @ moved, moved @ moved, dpo @ dpo
    delta_square, product, moved_square, dpo_square = map(float, sums)
    alpha = product / delta_square if delta_square else 0.0
    rest = max(0.0, moved_square - alpha * product)
    scale = dpo_square or 1.0
    return Fit(name, alpha, delta_square, sqrt(delta_square / scale), sqrt(rest / scale))
