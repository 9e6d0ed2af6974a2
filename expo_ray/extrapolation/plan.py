"""The plan of a pair: everything that decides the bytes, from headers alone."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import isfinite

from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.checkpoint.quantisation import refuse_unusable
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.checkpoint.vocabulary import (
    differing_rows,
    has_vocabulary,
    is_same_vocabulary_file,
    read_vocabulary,
)
from expo_ray.checkpoint.weight_files import stem_of
from expo_ray.config import Pair, PairOptions, format_alpha
from expo_ray.errors import CheckpointError, ExpoError, PairError, Problems, problems_of
from expo_ray.extrapolation.layout import ShardPlan, lay_out
from expo_ray.extrapolation.match import (
    Match,
    match_parents,
    written_dtype,
)
from expo_ray.storage import Store, local_path, open_store
from expo_ray.text import first_few, shown, shown_names

# Part of every plan id: raised when the same plan gives other bytes than before.
ARITHMETIC_VERSION = 1
# `save_pretrained` of an adapter may leave its own beside it; a merged model takes those of the model it is merged into.
_OF_THE_BASE = ("config.json", "generation_config.json")


# Constants are small, and a large one that differs does so at its beginning: of each, planning reads no more than this.
_MOST_CONSTANT_BYTES = 64 << 10
_MOST_CONSTANTS = 1024
_READERS = 16


@dataclass(frozen=True)
class PairPlan:
    """A pair, matched tensor by tensor and laid out in shards.

    Attributes:
        outputs: folder of the model of each alpha. Not part of the plan's id: the place does not affect the bytes.
        notes: what a user should know and nothing is wrong with.
        format_changes: rules that were added since the first version and change the bytes of this pair. They are part of the
            id, so that models published before are not taken for these.
    """

    name: str
    sft: Checkpoint
    dpo: Checkpoint
    options: PairOptions
    shards: tuple[ShardPlan, ...]
    outputs: Mapping[float, str]
    notes: tuple[str, ...] = ()
    format_changes: tuple[str, ...] = ()

    @property
    def base(self) -> Checkpoint:
        """The checkpoint whose tensors the plan starts from: dpo, or sft where an adapter is merged into it."""
        return self.sft if self.dpo.adapter and self.options.adapter == "merge" else self.dpo

    @property
    def scaled(self) -> bool:
        """True if the output is dpo's adapter with another scale."""
        return bool(self.dpo.adapter) and self.options.adapter == "scale"

    @property
    def side_files(self) -> Mapping[str, Checkpoint]:
        """The files copied beside the weights, by key, and the parent that each is taken from.

        A merged model is sft's architecture with the adapter's tokenizer.
        """
        return self._files_beside(self.base)

    @property
    def engine_side_files(self) -> Mapping[str, Checkpoint]:
        """The files beside the weights that an engine for the pair reads, by key, and the parent that each is taken from.

        For an adapter they are those of the merged model, whether or not the output is one.
        """
        return self._files_beside(self.sft if self.dpo.adapter else self.dpo)

    def _files_beside(self, model: Checkpoint) -> Mapping[str, Checkpoint]:
        sources = dict.fromkeys(model.side_files, model)
        own = [key for key in self.dpo.side_files if model is self.dpo or key not in _OF_THE_BASE]
        return sources | dict.fromkeys(own, self.dpo)

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Files of the parents that are neither copied into the model nor written anew."""
        left = {*self.base.left_behind, *self.dpo.left_behind} - set(self.side_files)
        return tuple(sorted(left))

    @property
    def bytes_written(self) -> int:
        """Size of one model's weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes that one pass reads from both parents; the same for any number of alphas."""
        return sum(
            tensor.base.nbytes + (tensor.sft.nbytes if tensor.sft else 0)
            for shard in self.shards
            for tensor in shard.tensors
        )

    def plan_id(self, alpha: float) -> str:
        """Digest of all that decides the bytes of the model at `alpha`: inputs, options and version of the arithmetic, but no place or machine."""
        options = self.options.model_dump(mode="json", include=set(PairOptions.model_fields))
        identity = {
            "arithmetic_version": ARITHMETIC_VERSION,
            "alpha": alpha,
            "options": {key: value for key, value in options.items() if key not in ("alphas", "allow_pickle")}
            | {"multipliers": list(self.options.multipliers.items())},  # their order counts
            "sft": _fingerprint(self.sft),
            "dpo": _fingerprint(self.dpo),
        } | ({"revised": self.format_changes} if self.format_changes else {})
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def plan_pair(pair: Pair, outputs: Mapping[float, str]) -> PairPlan:
    """Read both parents' headers, match their tensors and lay out the shards.

    Raises:
        Problems: with everything that is wrong with the pair.
    """
    problems: list[ExpoError] = []
    sft, dpo = (
        _read_parent(side, getattr(pair, side), pair.allow_pickle, problems) for side in ("sft", "dpo")
    )
    if sft and sft.adapter:
        problems.append(
            CheckpointError(
                "sft is an adapter; merge it first (`merge_and_unload`, save) and pass the merged folder"
            )
        )
    if sft and dpo and _same_files(sft, dpo):
        problems.append(
            PairError(f"sft ({sft.uri}) and dpo ({dpo.uri}) are the same files; name two different models")
        )
    if sft is None or dpo is None or problems:
        problems += option_problems(pair)
        raise Problems([named(pair.name, problem) for problem in problems])
    return plan_from_headers(pair, sft, dpo, outputs)


def plan_from_headers(pair: Pair, sft: Checkpoint, dpo: Checkpoint, outputs: Mapping[float, str]) -> PairPlan:
    """Match the tensors of parents whose headers have been read, and lay out the shards.

    Raises:
        InputChanged: if a tokenizer that has to be read is no longer the one that was listed.
        Problems: with everything that is wrong with the pair.
    """
    match = match_parents(sft, dpo, pair)
    if problems := [*match.problems, *option_problems(pair)]:
        raise Problems([named(pair.name, problem) for problem in problems])
    if dpo.adapter and pair.adapter == "scale":  # readers of adapters know one file only
        shards = lay_out(match.tensors, sys.maxsize, "adapter_model")
    else:
        shards = lay_out(
            match.tensors, pair.shard_size, stem_of(tensor.file for tensor in dpo.tensors.values())
        )
    others = _compare_kept(sft, dpo, match.kept)
    notes = [*match.notes, *_kept_notes(others), *_vocabulary_notes(sft, dpo, pair)]
    plan = PairPlan(
        pair.name, sft, dpo, pair, shards, outputs, tuple(notes), _format_changes(match, others, dpo, pair)
    )
    return replace(plan, notes=(*notes, *_side_file_notes(plan)))


def _side_file_notes(plan: PairPlan) -> list[str]:
    """Name the files beside the weights that stay behind, and those that hold weights and are only copied."""
    notes = []
    if left := plan.left_behind:
        notes.append(
            f"{len(left)} file(s) are not carried over, as nothing in the model names them: {shown_names(left)}; copy "
            "those that you need"
        )
    copied = [key for key, parent in plan.side_files.items() if key in parent.side_weights]
    if copied:
        notes.append(
            f"{len(copied)} file(s) beside the model hold weights; they are copied and not extrapolated: "
            f"{shown_names(copied)}"
        )
    return notes


def _format_changes(match: Match, others: Sequence[Tensor], dpo: Checkpoint, pair: Pair) -> tuple[str, ...]:
    """Rules added since the first version that apply to this pair; see `PairPlan.format_changes`."""
    merged = dpo.adapter and pair.adapter == "merge"
    reasons = {
        # Constants are copied from dpo, not extrapolated.
        "constants": any(tensor.dtype in WEIGHT_DTYPES for tensor in others),
        # Rows are matched by token where both vocabularies have the same size and another order.
        "rows": match.other_rows,
        # A second copy of a tied weight gets the random bits of the first, so that they stay equal.
        "copies": bool(match.copies),
        # A merged model takes its configuration from sft, not from the folder of the adapter.
        "configuration": merged and any(key in dpo.side_files for key in _OF_THE_BASE),
    }
    return tuple(reason for reason, applies in reasons.items() if applies)


def _vocabulary_notes(sft: Checkpoint, dpo: Checkpoint, pair: Pair) -> list[str]:
    """Warn if rows that are matched by position stand for other tokens, as far as both tokenizers can be read."""
    if dpo.adapter or pair.vocab == "by-token" or not (has_vocabulary(sft) and has_vocabulary(dpo)):
        return []
    stores = open_store(dpo.uri), open_store(sft.uri)
    try:
        if is_same_vocabulary_file(stores[0], dpo, stores[1], sft):
            return []
        vocabularies = read_vocabulary(stores[0], dpo), read_vocabulary(stores[1], sft)
    except CheckpointError:
        return []
    rows = min(VocabularyWeights(checkpoint).rows for checkpoint in (dpo, sft))
    differ = [entry for entry in differing_rows(*vocabularies, rows) if entry[1] and entry[2]]
    if not differ:
        return []
    row, mine, theirs = differ[0]
    return [
        f"the tokenizers name {len(differ)} row(s) of the vocabulary differently (row {row} is {shown(mine)!r} in dpo and "
        f"{shown(theirs)!r} in sft), and rows are matched by position; `vocab: by-token` matches them by token"
    ]


def _kept_notes(tensors: Sequence[Tensor]) -> list[str]:
    """Name the kept tensors that differ between the parents."""
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


def _compare_kept(sft: Checkpoint, dpo: Checkpoint, kept: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Read the beginnings of tensors that are kept as dpo has them, and return dpo's where sft's is another.

    Args:
        kept: a tensor of dpo and its partner in sft each; another dtype or shape is a difference as well.
    """
    different = {mine.name for mine, other in kept if _form(mine) != _form(other)}
    alike = [(mine, other) for mine, other in kept if mine.name not in different][:_MOST_CONSTANTS]
    if alike:
        stores = open_store(dpo.uri), open_store(sft.uri)

        def read_both(tensors: tuple[Tensor, Tensor]) -> tuple[bytes, bytes]:
            mine, other = tensors
            return _read_beginning(stores[0], dpo, mine), _read_beginning(stores[1], sft, other)

        with ThreadPoolExecutor(_READERS, "kept") as pool:
            beginnings = pool.map(read_both, alike)
            different |= {
                mine.name
                for (mine, _), (ours, theirs) in zip(alike, beginnings, strict=True)
                if ours != theirs
            }
    return [mine for mine, _ in kept if mine.name in different]


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _read_beginning(store: Store, checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    data = bytearray(min(tensor.nbytes, _MOST_CONSTANT_BYTES))
    if data:
        store.read_into(tensor.file, tensor.start, memoryview(data), etag=checkpoint.files[tensor.file].etag)
    return bytes(data)


def _read_parent(side: str, uri: str, allow_pickle: bool, problems: list[ExpoError]) -> Checkpoint | None:
    """Read a parent's headers; what is wrong with it is added to `problems`, and None returned if it cannot be read."""
    try:
        checkpoint = read_checkpoint(open_store(uri), allow_pickle=allow_pickle)
    except ExpoError as error:
        problems += (named(side, problem) for problem in problems_of(error))
        return None
    problems += (named(side, problem) for problem in refuse_unusable(checkpoint))
    return checkpoint


def option_problems(pair: Pair) -> list[ExpoError]:
    """Problems with options that exclude each other, and with multipliers that carry an alpha out of its range."""
    problems: list[ExpoError] = []
    written = written_dtype(pair)
    if pair.dtype not in ("keep", written):
        problems.append(
            PairError(
                f"rounding is {pair.rounding}, which writes {written}, and dtype is {pair.dtype}; drop one"
            )
        )
    return problems + [
        PairError(
            f"alpha {format_alpha(alpha)} times the multiplier {multiplier} of `{pattern}` is {alpha * multiplier}; it must be a "
            "finite number of at least -1"
        )
        for alpha in pair.alphas
        for pattern, multiplier in pair.multipliers.items()
        if not isfinite(alpha * multiplier) or alpha * multiplier < -1
    ]


def _fingerprint(checkpoint: Checkpoint) -> list[list[str | int]]:
    """Key, size and ETag of every file."""
    return [[info.key, info.size, info.etag] for _, info in sorted(checkpoint.files.items())]


def _same_files(sft: Checkpoint, dpo: Checkpoint) -> bool:
    """True if both are one folder, or the digests of a store say so; the times and sizes of local files prove nothing."""
    sft_folder, dpo_folder = local_path(sft.uri), local_path(dpo.uri)
    if sft_folder is None or dpo_folder is None:
        return _fingerprint(sft) == _fingerprint(dpo)
    return sft_folder.samefile(dpo_folder)


def named(name: str, error: ExpoError) -> ExpoError:
    """The same error with the name of its pair or parent in front."""
    return type(error)(f"{name}: {error}")
