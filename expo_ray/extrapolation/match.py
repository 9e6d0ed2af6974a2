"""Match every tensor of dpo with its partner in sft, row by row if need be, and plan the output tensor of the two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

from expo_ray.arithmetic.rule import OUTPUT_DTYPES, ROUNDINGS
from expo_ray.checkpoint.adapter import LoraLayer, match_lora_layers
from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.renaming import match_names
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.checkpoint.vocabulary import (
    RowRun,
    differing_rows,
    has_vocabulary,
    match_rows,
    read_vocabulary,
)
from expo_ray.config import OutputDtype, PairOptions
from expo_ray.errors import CheckpointError, Collected, ExpoError, PairError, problems_of
from expo_ray.extrapolation.mismatch import Unmatched, explain
from expo_ray.storage import open_store
from expo_ray.text import first_few, shown, shown_names
from expo_ray.untrusted import compile_pattern

# Heads of these embeddings shared their random bits from the first version on. Other tied copies came later, and a plan with one
# says so in its id (`copies`), because its bytes changed then.
_FIRST_HEADS = re.compile(r"(^|\.)(lm_head|output_layer|output|embed_out)\.weight$")
_FIRST_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """An output tensor, and the tensors of both parents that it is computed from.

    Attributes:
        dtype: safetensors' name of the output's dtype.
        shape: dpo's.
        base: the tensor that the output has at alpha 0, before an adapter is merged: dpo's, or sft's where `low_rank` is set.
        sft: dpo's partner in sft; None where dpo is kept as it is, and where `low_rank` is set.
        multiplier: alpha times this is the alpha of the tensor; tied copies share one, so that they stay equal.
        runs: rows of dpo and their rows in sft, where the vocabularies differ; empty if elements match one to one.
        random_name: name that seeds its random bits; tied copies share one, so that they stay equal.
        low_rank: the adapter's layer that is merged into `base`, which then is sft's tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Tensor
    sft: Tensor | None
    multiplier: float = 1.0
    runs: tuple[RowRun, ...] = ()
    random_name: str = ""
    low_rank: LoraLayer | None = None


@dataclass
class Match:
    """The outcome of matching.

    Attributes:
        tensors: in dpo's order.
        problems: everything that is wrong.
        notes: what a user should know and nothing is wrong with.
        kept: tensors that both parents have and that are no weights, each dpo's and sft's; dpo's are kept.
        other_rows: True if rows of equally large vocabularies are matched by token, and not one to one.
        copies: names of tied copies stored beside their original, other than an output head's.
    """

    tensors: list[TensorPlan] = field(default_factory=list)
    problems: list[ExpoError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    other_rows: bool = False
    copies: list[str] = field(default_factory=list)


def output_dtype(stored: str, options: PairOptions) -> str:
    """The safetensors dtype in which a tensor stored as `stored` is written; other than weights stay as they are."""
    if stored not in WEIGHT_DTYPES:
        return stored
    wanted = written_dtype(options)
    return stored if wanted == "keep" else OUTPUT_DTYPES[wanted]


def written_dtype(options: PairOptions) -> OutputDtype:
    """The dtype that all weights are written in, `keep` if each keeps dpo's: the rounding's own, else the one asked for."""
    own = ROUNDINGS[options.rounding].output_dtype
    return options.dtype if own == "keep" else own


def multiplier_of(name: str, options: PairOptions) -> float:
    """The multiplier of the first pattern found in `name`, 1 without one."""
    return next(
        (value for pattern, value in options.multipliers.items() if compile_pattern(pattern).search(name)),
        1.0,
    )


def match_parents(sft: Checkpoint, dpo: Checkpoint, options: PairOptions) -> Match:
    """Match the tensors of both parents: by name, or layer by layer where dpo is an adapter on sft.

    Reads both tokenizers where `vocab` says that rows are matched by token.
    """
    if dpo.adapter:
        return _match_adapter(sft, dpo, options)
    matcher = _Matcher(sft, dpo, options)
    tensors = [matcher.plan_tensor(tensor) for tensor in dpo.tensors.values()]
    return Match(
        tensors=tensors,
        problems=matcher.problems(),
        notes=matcher.notes(),
        kept=matcher.kept,
        other_rows=matches_other_rows(tensors),
        copies=tied_copies(tensors),
    )


def _match_adapter(sft: Checkpoint, dpo: Checkpoint, options: PairOptions) -> Match:
    """Plan sft's tensors, some with a layer of the adapter to merge; or the adapter's own, which is scaled as a whole."""
    merging = options.adapter == "merge"
    try:
        fitted = match_lora_layers(dpo, sft, merging=merging)
    except ExpoError as error:
        return Match(problems=[error])
    layers = {layer.base_name: layer for layer in fitted.layers}
    source = sft if merging else dpo
    tensors = [
        TensorPlan(
            name=name,
            dtype=output_dtype(tensor.dtype, options) if merging else tensor.dtype,
            shape=tensor.shape,
            base=tensor,
            sft=None,
            multiplier=multiplier_of(name, options),
            random_name=name,
            low_rank=layers.get(name) if merging else None,
        )
        for name, tensor in source.tensors.items()
    ]
    problems: list[ExpoError] = _grown_vocabulary(sft, dpo) if merging else []
    if not merging and (options.multipliers or options.dtype != "keep"):
        problems.append(
            PairError("dpo is an adapter and only its scale is changed, so `multipliers` and `dtype` cannot be kept; "
                      "set `adapter: merge` to write a whole model")
        )  # fmt: skip
    return Match(tensors, problems, list(fitted.notes))


def matches_other_rows(tensors: Sequence[TensorPlan]) -> bool:
    """True if rows of a vocabulary that is equally large in both parents are matched by token, and not one to one."""
    return any(
        tensor.runs and tensor.sft is not None and tensor.shape == tensor.sft.shape for tensor in tensors
    )


def tied_copies(tensors: Sequence[TensorPlan]) -> list[str]:
    """Tied copies stored beside their original, but for the heads that have always been known as such."""
    return [
        tensor.name
        for tensor in tensors
        if tensor.random_name != tensor.name
        and tensor.sft is not None
        and not (_FIRST_HEADS.search(tensor.name) and _FIRST_EMBEDDINGS.search(tensor.random_name))
    ]


class _Matcher:
    """Match two whole models by name.

    Attributes:
        names: sft's name of a tensor -> dpo's, where the two call it differently.
        sft: sft with dpo's names.
        missing: names of weights that sft lacks.
        resized: names of vocabulary tensors with other numbers of rows, where `vocab` refuses that.
        misfits: weights whose shapes or dtypes do not fit, with both.
        constants: names of buffers that only dpo has.
        kept: tensors of both that are no weights.
        unmapped: why rows cannot be matched by token.
    """

    def __init__(self, sft: Checkpoint, dpo: Checkpoint, options: PairOptions) -> None:
        self.names = match_names(sft.tensors, dpo.tensors)
        self.sft = replace(
            sft, tensors={self.names.get(name, name): tensor for name, tensor in sft.tensors.items()}
        )
        self.dpo, self.options = dpo, options
        self.dpo_vocabulary, self.sft_vocabulary = VocabularyWeights(dpo), VocabularyWeights(self.sft)
        self.rows = self.dpo_vocabulary.rows, self.sft_vocabulary.rows
        self.map_rows = cache(self._map_rows)  # head and embedding ask for the same rows
        self.missing: list[str] = []
        self.resized: list[str] = []
        self.misfits: list[str] = []
        self.constants: list[str] = []
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.unmapped: ExpoError | None = None

    def plan_tensor(self, tensor: Tensor) -> TensorPlan:
        """Plan the output of a tensor of dpo; if there is a problem, record it and keep dpo's tensor."""
        name = tensor.name
        weight = self.dpo_vocabulary.owner(name)
        alone = TensorPlan(
            name=name,
            dtype=output_dtype(tensor.dtype, self.options),
            shape=tensor.shape,
            base=tensor,
            sft=None,
            multiplier=multiplier_of(weight, self.options),
            random_name=weight,
        )
        partner = self.sft_vocabulary.tensor(name)
        if tensor.dtype not in WEIGHT_DTYPES or is_constant(tensor):
            self._keep(tensor, partner)
        elif alone.multiplier == 0:
            pass
        elif partner is None:
            self.missing.append(name)
        elif partner.dtype not in WEIGHT_DTYPES:
            self.misfits.append(f"{shown(name)}: dpo is {tensor.dtype}, sft is {partner.dtype}")
        elif partner.shape == tensor.shape and not self._by_token(name):
            return replace(alone, sft=partner)
        elif not self._is_vocabulary(tensor, partner):
            self.misfits.append(
                f"{shown(name)}: dpo has shape {list(tensor.shape)}, sft has {list(partner.shape)}"
            )
        elif self.options.vocab == "refuse":
            self.resized.append(name)
        else:
            return self._with_rows(alone, partner)
        return alone

    def _keep(self, tensor: Tensor, partner: Tensor | None) -> None:
        if partner is not None:
            self.kept.append((tensor, partner))
        elif tensor.dtype in WEIGHT_DTYPES:
            self.constants.append(tensor.name)

    def _by_token(self, name: str) -> bool:
        return self.options.vocab == "by-token" and self.dpo_vocabulary.is_vocabulary(name)

    def _is_vocabulary(self, dpo: Tensor, sft: Tensor) -> bool:
        if not dpo.shape or dpo.shape[1:] != sft.shape[1:]:
            return False
        return (dpo.shape[0], sft.shape[0]) == self.rows or self.dpo_vocabulary.is_vocabulary(dpo.name)

    def _with_rows(self, alone: TensorPlan, partner: Tensor) -> TensorPlan:
        """Plan of a vocabulary tensor, matched row by row; `alone` if rows cannot be matched."""
        if self.unmapped is not None:
            return alone
        try:
            runs = self.map_rows(alone.shape[0], partner.shape[0])
        except ExpoError as error:
            self.unmapped = error
            return alone
        return replace(alone, sft=partner, runs=runs)

    def _map_rows(self, dpo_rows: int, sft_rows: int) -> tuple[RowRun, ...]:
        """Runs of rows of dpo and of sft that stand for the same tokens; empty if all match one to one."""
        if self.options.vocab == "by-token":
            dpo_vocab, sft_vocab = _read_vocabularies(self.dpo, self.sft)
            if dpo_rows == sft_rows and not differing_rows(dpo_vocab, sft_vocab, dpo_rows):
                return ()
            if dpo_vocab.keys().isdisjoint(sft_vocab):
                raise PairError(
                    "the tokenizers of sft and dpo have no token in common, so no row can be matched by token; pass the tokenizer "
                    "that each model was trained with, or set `vocab: keep-dpo` to match rows by position"
                )
            return tuple(match_rows(dpo_vocab, sft_vocab, dpo_rows, sft_rows))
        shared = min(dpo_rows, sft_rows)
        matched = RowRun(0, 0, shared)
        return (matched,) if dpo_rows == shared else (matched, RowRun(shared, None, dpo_rows - shared))

    def notes(self) -> list[str]:
        """Notes for the user on what is no error: buffers that are kept, names that differ, patterns that match nothing."""
        names = [*self.dpo.tensors, *self.sft.tensors]
        idle = [
            pattern
            for pattern in self.options.multipliers
            if not any(compile_pattern(pattern).search(name) for name in names)
        ]
        notes = [
            f"no tensor has a name with the pattern `{shown(pattern)}` of `multipliers`" for pattern in idle
        ]
        if self.constants:
            notes.append(
                f"{len(self.constants)} buffer(s) are in dpo only and kept as they are: {_names(self.constants)}"
            )
        if self.names:
            old, new = next(iter(self.names.items()))
            notes.append(
                f"sft and dpo call {len(self.names)} tensor(s) differently, such as {shown(old)} and {shown(new)}; they are paired, "
                "and the output has dpo's names"
            )
        return notes

    def problems(self) -> list[ExpoError]:
        """Everything that is wrong, as one error for each cause."""
        left = Unmatched(self.missing, self._extra(), self.names, len(self.dpo.tensors))
        problems: list[ExpoError] = [*explain(left, self.sft_vocabulary, self.dpo_vocabulary)]
        if self.resized:
            problems.append(
                PairError(
                    f"vocabularies differ, dpo has {self.rows[0]} rows and sft {self.rows[1]} ({_names(self.resized)}); set "
                    "`vocab: by-token` to match rows through both tokenizers, or `vocab: keep-dpo` to leave the extra rows "
                    "as in dpo"
                )
            )
        if self.unmapped:
            problems += problems_of(self.unmapped)
        if self.misfits:
            problems.append(
                PairError(
                    f"{len(self.misfits)} tensor(s) do not fit: {first_few(self.misfits)}; name as sft the model that dpo was "
                    "trained from"
                )
            )
        return problems

    def _extra(self) -> list[str]:
        return [
            name
            for name, tensor in self.sft.tensors.items()
            if self.dpo_vocabulary.tensor(name) is None
            and tensor.dtype in WEIGHT_DTYPES
            and not is_constant(tensor)
            and multiplier_of(name, self.options) != 0
        ]


def _grown_vocabulary(sft: Checkpoint, dpo: Checkpoint) -> list[ExpoError]:
    """Refuse an adapter whose tokenizer or configuration knows rows that sft does not have."""
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


def _read_vocabularies(*checkpoints: Checkpoint) -> list[dict[str, int]]:
    problems, vocabularies = Collected(), list[dict[str, int]]()
    for checkpoint in checkpoints:
        with problems.catching():
            vocabularies.append(read_vocabulary(open_store(checkpoint.uri), checkpoint))
    problems.raise_any()
    return vocabularies


def _names(names: Sequence[str]) -> str:
    return shown_names(names)
