"""The plan of a pair: everything that decides the bytes, from headers alone."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite

from expo_ray.checkpoint.adapter import lora_layers
from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.checkpoint.quantisation import refuse_unusable
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.checkpoint.vocabulary import (
    RowRun,
    differing_rows,
    has_vocabulary,
    is_same_vocabulary_file,
    match_rows,
    read_vocabulary,
)
from expo_ray.checkpoint.weight_files import stem_of
from expo_ray.config import Pair, PairOptions, format_alpha
from expo_ray.errors import CheckpointError, ExpoError, PairError, Problems, problems_of
from expo_ray.extrapolation.kept import are_weights, differing, notes_on
from expo_ray.extrapolation.layout import ShardPlan, lay_out
from expo_ray.extrapolation.match import (
    Match,
    TensorPlan,
    match_tensors,
    multiplier_of,
    output_dtype,
    written_dtype,
)
from expo_ray.storage import local_path, open_store
from expo_ray.text import first_few, shown

# Part of every plan id: raised when the same plan would give other bytes than before.
ARITHMETIC_VERSION = 1
# What `save_pretrained` of an adapter may leave beside it, and what a merged model has from the model it was merged into.
_OF_THE_BASE = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class PairPlan:
    """A pair, matched tensor by tensor and laid out in shards.

    Attributes:
        outputs: folder of the model of each alpha; where it is written is not part of what it is.
        notes: what a user should know and nothing is wrong with.
        revised: in which ways the bytes are others than those that the same inputs gave before this was written down.
    """

    name: str
    sft: Checkpoint
    dpo: Checkpoint
    options: PairOptions
    shards: tuple[ShardPlan, ...]
    outputs: Mapping[float, str]
    notes: tuple[str, ...] = ()
    revised: tuple[str, ...] = ()

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
        sources = dict.fromkeys(self.base.side_files, self.base)
        own = [key for key in self.dpo.side_files if self.base is self.dpo or key not in _OF_THE_BASE]
        return sources | dict.fromkeys(own, self.dpo)

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Files of the parents that the model is made from which are neither copied nor written anew."""
        left = {*self.base.left_behind, *self.dpo.left_behind} - set(self.side_files)
        return tuple(sorted(left))

    @property
    def bytes_written(self) -> int:
        """Size of one model's weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """What one pass reads from both parents, whatever the number of alphas."""
        return sum(
            tensor.base.nbytes + (tensor.sft.nbytes if tensor.sft else 0)
            for shard in self.shards
            for tensor in shard.tensors
        )

    def plan_id(self, alpha: float) -> str:
        """Digest of all that decides the bytes of the model at `alpha`: inputs, arithmetic, layout; never a place."""
        options = self.options.model_dump(mode="json", include=set(PairOptions.model_fields))
        identity = {
            "arithmetic_version": ARITHMETIC_VERSION,
            "alpha": alpha,
            "options": {key: value for key, value in options.items() if key not in ("alphas", "allow_pickle")}
            | {"multipliers": list(self.options.multipliers.items())},  # their order counts
            "sft": _fingerprint(self.sft),
            "dpo": _fingerprint(self.dpo),
        } | ({"revised": self.revised} if self.revised else {})
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
        problems += impossible_options(pair)
        raise Problems([named(pair.name, problem) for problem in problems])
    return plan_parents(pair, sft, dpo, outputs)


def plan_parents(pair: Pair, sft: Checkpoint, dpo: Checkpoint, outputs: Mapping[float, str]) -> PairPlan:
    """Match the tensors of parents whose headers have been read, and lay out the shards.

    Raises:
        InputChanged: if a tokenizer that has to be read is no longer the one that was listed.
        Problems: with everything that is wrong with the pair.
    """
    match = _match(sft, dpo, pair)
    if problems := [*match.problems, *impossible_options(pair)]:
        raise Problems([named(pair.name, problem) for problem in problems])
    if dpo.adapter and pair.adapter == "scale":  # readers of adapters know one file only
        shards = lay_out(match.tensors, sys.maxsize, "adapter_model")
    else:
        shards = lay_out(
            match.tensors, pair.shard_size, stem_of(tensor.file for tensor in dpo.tensors.values())
        )
    others = differing(sft, dpo, match.kept)
    notes = [*match.notes, *notes_on(others), *_vocabulary_notes(sft, dpo, pair)]
    plan = PairPlan(
        pair.name, sft, dpo, pair, shards, outputs, tuple(notes), _revised(match, others, dpo, pair)
    )
    return replace(plan, notes=(*notes, *_side_file_notes(plan)))


def _side_file_notes(plan: PairPlan) -> list[str]:
    """Tell which files beside the weights stay behind, and which hold weights that are only copied."""
    notes = []
    if left := plan.left_behind:
        notes.append(
            f"{len(left)} file(s) are not carried over, as nothing in the model names them: {first_few(list(map(shown, left)))}; copy "
            "those that you need"
        )
    copied = [key for key, parent in plan.side_files.items() if key in parent.side_weights]
    if copied:
        notes.append(
            f"{len(copied)} file(s) with weights of their own are copied as they are, and not extrapolated: "
            f"{first_few(list(map(shown, copied)))}"
        )
    return notes


def _revised(match: Match, others: Sequence[Tensor], dpo: Checkpoint, pair: Pair) -> tuple[str, ...]:
    """How the bytes differ from those of the same inputs under the first rules, so that a plan id names one model for ever."""
    merged = dpo.adapter and pair.adapter == "merge"
    reasons = {
        "constants": are_weights(others),
        "rows": match.other_rows,
        "copies": bool(match.copies),
        "configuration": merged and any(key in dpo.side_files for key in _OF_THE_BASE),
    }
    return tuple(reason for reason, applies in reasons.items() if applies)


def _vocabulary_notes(sft: Checkpoint, dpo: Checkpoint, pair: Pair) -> list[str]:
    """Tell that rows matched by position stand for other tokens, as far as both tokenizers can be read."""
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


def _read_parent(side: str, uri: str, allow_pickle: bool, problems: list[ExpoError]) -> Checkpoint | None:
    try:
        checkpoint = read_checkpoint(open_store(uri), allow_pickle=allow_pickle)
    except ExpoError as error:
        problems += (named(side, problem) for problem in problems_of(error))
        return None
    problems += (named(side, problem) for problem in refuse_unusable(checkpoint))
    return checkpoint


def impossible_options(pair: Pair) -> list[ExpoError]:
    """Options that exclude each other, and multipliers that carry an alpha out of its range."""
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


def _match(sft: Checkpoint, dpo: Checkpoint, pair: Pair) -> Match:
    if not dpo.adapter:
        return match_tensors(sft, dpo, pair, lambda *rows: _map_rows(sft, dpo, pair, *rows))
    try:
        fitted = lora_layers(dpo, sft, merging=pair.adapter == "merge")
    except ExpoError as error:
        return Match(problems=[error])
    layers = {layer.base_name: layer for layer in fitted.layers}
    source = sft if pair.adapter == "merge" else dpo
    tensors = [
        TensorPlan(
            name=name,
            dtype=output_dtype(tensor.dtype, pair) if pair.adapter == "merge" else tensor.dtype,
            shape=tensor.shape,
            base=tensor,
            sft=None,
            multiplier=multiplier_of(name, pair),
            random_name=name,
            low_rank=layers.get(name) if pair.adapter == "merge" else None,
        )
        for name, tensor in source.tensors.items()
    ]
    problems: list[ExpoError] = _grown_vocabulary(sft, dpo) if pair.adapter == "merge" else []
    if pair.adapter == "scale" and (pair.multipliers or pair.dtype != "keep"):
        problems.append(
            PairError("dpo is an adapter and only its scale is changed, so `multipliers` and `dtype` cannot be kept; "
                      "set `adapter: merge` to write a whole model")
        )  # fmt: skip
    return Match(tensors, problems, list(fitted.notes))


def _grown_vocabulary(sft: Checkpoint, dpo: Checkpoint) -> list[ExpoError]:
    """An adapter whose tokenizer, or configuration, knows rows that sft does not have."""
    rows, declared = VocabularyWeights(sft).rows, VocabularyWeights(dpo).rows
    where = "config.json"
    if has_vocabulary(dpo):
        with suppress(CheckpointError):
            tokens = read_vocabulary(open_store(dpo.uri), dpo)
            declared, where = max(declared, 1 + max(tokens.values(), default=-1)), "tokenizer or config.json"
    if not rows or declared <= rows:
        return []
    return [
        PairError(
            f"the adapter was trained with {declared} rows in the vocabulary (its {where}) and sft has {rows}; resize sft as "
            f"training did (`model.resize_token_embeddings({declared})`, save) and pass that, or keep the adapter apart "
            "(`adapter: scale`)"
        )
    ]


def _map_rows(sft: Checkpoint, dpo: Checkpoint, pair: Pair, dpo_rows: int, sft_rows: int) -> Sequence[RowRun]:
    if pair.vocab == "by-token":
        dpo_vocab, sft_vocab = _vocabularies(dpo, sft)
        if dpo_rows == sft_rows and not differing_rows(dpo_vocab, sft_vocab, dpo_rows):
            return []
        if dpo_vocab.keys().isdisjoint(sft_vocab):
            raise PairError(
                "the tokenizers of sft and dpo have no token in common, so no row can be matched by token; pass the tokenizer that "
                "each model was trained with, or set `vocab: keep-dpo` to match rows by position"
            )
        return match_rows(dpo_vocab, sft_vocab, dpo_rows, sft_rows)
    shared = min(dpo_rows, sft_rows)
    runs = [RowRun(0, 0, shared)]
    return runs if dpo_rows == shared else [*runs, RowRun(shared, None, dpo_rows - shared)]


def _vocabularies(*checkpoints: Checkpoint) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    problems: list[ExpoError] = []
    for checkpoint in checkpoints:
        try:
            found.append(read_vocabulary(open_store(checkpoint.uri), checkpoint))
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise Problems(problems)
    return found


def _fingerprint(checkpoint: Checkpoint) -> list[list[str | int]]:
    return [[info.key, info.size, info.etag] for _, info in sorted(checkpoint.files.items())]


def _same_files(sft: Checkpoint, dpo: Checkpoint) -> bool:
    """True if both are one folder, or the digests of a store say so; the times and sizes of local files prove nothing."""
    sft_folder, dpo_folder = local_path(sft.uri), local_path(dpo.uri)
    if sft_folder is None or dpo_folder is None:
        return _fingerprint(sft) == _fingerprint(dpo)
    return sft_folder.samefile(dpo_folder)


def named(name: str, error: ExpoError) -> ExpoError:
    """The same error with what it is about in front."""
    return type(error)(f"{name}: {error}")
