"""Which tensor of sft belongs to which tensor of dpo, and what each output tensor is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from expo_ray.checkpoint.adapter import LoraLayer
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Checkpoint, Tensor
from expo_ray.checkpoint.tied import embedding_name, tied_alias
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.config import PairOptions
from expo_ray.errors import ExpoError, PairError, each, some
from expo_ray.untrusted import compile_pattern

OUTPUT_DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# Constants that older libraries stored beside the weights and newer ones compute: absent on one side is no mismatch.
_KNOWN_BUFFERS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias)$"
)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one output tensor comes from its parents.

    Attributes:
        dtype: safetensors' name of the output's dtype.
        shape: dpo's.
        dpo: the tensor of dpo; of sft's where `lora` is set.
        sft: its partner, or None where dpo is kept as it is.
        multiplier: alpha times this is the alpha of the tensor; tied copies share one, so that they stay equal.
        runs: rows of dpo and their rows in sft, where the vocabularies differ; empty if elements match one to one.
        random_name: name that seeds its random bits; tied copies share one, so that they stay equal.
        lora: the low-rank delta to merge.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dpo: Tensor
    sft: Tensor | None
    multiplier: float = 1.0
    runs: tuple[RowRun, ...] = ()
    random_name: str = ""
    lora: LoraLayer | None = None


@dataclass
class Match:
    """The outcome of matching: tensors in dpo's order, what is wrong, and what is worth telling."""

    tensors: list[TensorPlan] = field(default_factory=list)
    problems: list[ExpoError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def output_dtype(stored: str, options: PairOptions) -> str:
    """The dtype in which a tensor stored as `stored` is written; tensors other than floats stay as they are."""
    if stored not in WEIGHT_DTYPES:
        return stored
    if options.rounding == "reference":
        return "BF16"  # the paper's script loads, computes and saves in bf16
    return stored if options.dtype == "keep" else OUTPUT_DTYPES[options.dtype]


def multiplier_of(name: str, options: PairOptions) -> float:
    """The multiplier of the first pattern found in `name`, 1 without one."""
    return next(
        (value for pattern, value in options.multipliers.items() if compile_pattern(pattern).search(name)),
        1.0,
    )


def match_tensors(
    sft: Checkpoint, dpo: Checkpoint, options: PairOptions, map_rows: Callable[[int, int], Sequence[RowRun]]
) -> Match:
    """Pair every tensor of dpo with its partner in sft by name.

    Args:
        sft: parent before alignment.
        dpo: parent after alignment; decides which tensors the output has.
        options: of the pair.
        map_rows: `(dpo_rows, sft_rows) -> runs`, asked only where the vocabularies differ and `vocab` allows it.
    """
    matcher = _Matcher(sft, dpo, options, map_rows)
    tensors = [matcher.plan(tensor) for tensor in dpo.tensors.values()]
    return Match(tensors, matcher.problems(), matcher.notes())


class _Matcher:
    """Both parents, and what has been found wrong with them so far."""

    def __init__(
        self,
        sft: Checkpoint,
        dpo: Checkpoint,
        options: PairOptions,
        map_rows: Callable[[int, int], Sequence[RowRun]],
    ) -> None:
        self.sft, self.dpo, self.options = sft, dpo, options
        self.dpo_tied, self.sft_tied = (tied_alias(one.tensors, one.config) for one in (dpo, sft))
        self.rows = _embedding_rows(dpo), _embedding_rows(sft)
        self.map_rows = cache(lambda *rows: tuple(map_rows(*rows)))
        self.missing: list[str] = []
        self.resized: list[str] = []
        self.misfits: list[str] = []
        self.buffers: list[str] = []
        self.unmapped: ExpoError | None = None

    def plan(self, tensor: Tensor) -> TensorPlan:
        """What becomes of one tensor of dpo; a problem is noted and dpo's tensor stands in."""
        name = tensor.name
        weight = self.dpo_tied.get(name, name)
        alone = TensorPlan(
            name=name,
            dtype=output_dtype(tensor.dtype, self.options),
            shape=tensor.shape,
            dpo=tensor,
            sft=None,
            multiplier=multiplier_of(weight, self.options),
            random_name=weight,
        )
        if tensor.dtype not in WEIGHT_DTYPES or alone.multiplier == 0:
            return alone
        partner = self.sft.tensors.get(name) or self.sft.tensors.get(self.sft_tied.get(name, ""))
        if partner is None and _KNOWN_BUFFERS.search(name):
            self.buffers.append(name)
        elif partner is None:
            self.missing.append(name)
        elif partner.dtype not in WEIGHT_DTYPES:
            self.misfits.append(f"{name}: dpo is {tensor.dtype}, sft is {partner.dtype}")
        elif partner.shape == tensor.shape:
            return replace(alone, sft=partner)
        elif not _is_vocabulary(tensor, partner, self.rows):
            self.misfits.append(f"{name}: dpo has shape {list(tensor.shape)}, sft has {list(partner.shape)}")
        elif self.options.vocab == "refuse":
            self.resized.append(name)
        elif self.unmapped is None:
            try:
                return replace(alone, sft=partner, runs=self.map_rows(*self.rows))
            except ExpoError as error:
                self.unmapped = error
        return alone

    def notes(self) -> list[str]:
        """What is worth telling and not wrong."""
        names = [*self.dpo.tensors, *self.sft.tensors]
        idle = [
            pattern
            for pattern in self.options.multipliers
            if not any(compile_pattern(pattern).search(name) for name in names)
        ]
        notes = [f"no tensor has a name with the pattern `{pattern}` of `multipliers`" for pattern in idle]
        if self.buffers:
            notes.append(
                f"{len(self.buffers)} buffer(s) are in dpo only and kept as they are: {some(self.buffers)}"
            )
        return notes

    def problems(self) -> list[ExpoError]:
        """Everything wrong, one error for each kind."""
        found: list[ExpoError] = []
        if self.missing:
            found.append(
                PairError(
                    f"sft lacks {len(self.missing)} tensor(s) of dpo: {some(self.missing)}; give two whole checkpoints of one "
                    "architecture, or keep dpo's with `multipliers: {<pattern>: 0}`"
                )
            )
        if extra := self._extra():
            found.append(
                PairError(
                    f"sft has {len(extra)} tensor(s) that dpo lacks: {some(extra)}; give two whole checkpoints of one "
                    "architecture, or leave them out with `multipliers: {<pattern>: 0}`"
                )
            )
        if self.resized:
            found.append(
                PairError(
                    f"vocabularies differ, dpo has {self.rows[0]} rows and sft {self.rows[1]} ({some(self.resized)}); set "
                    "`vocab: by-token` to match rows through both tokenizers, or `vocab: keep-dpo` to leave the extra rows "
                    "as in dpo"
                )
            )
        if self.unmapped:
            found += each(self.unmapped)
        if self.misfits:
            found.append(
                PairError(
                    f"{len(self.misfits)} tensor(s) do not fit: {some(self.misfits)}; sft and dpo must be of one "
                    "architecture and size"
                )
            )
        return found

    def _extra(self) -> list[str]:
        return [
            name
            for name, tensor in self.sft.tensors.items()
            if name not in self.dpo.tensors
            and name not in self.dpo_tied
            and tensor.dtype in WEIGHT_DTYPES
            and not _KNOWN_BUFFERS.search(name)
            and multiplier_of(name, self.options) != 0
        ]


def _embedding_rows(checkpoint: Checkpoint) -> int:
    name = embedding_name(checkpoint.tensors)
    return checkpoint.tensors[name].shape[0] if name else 0


def _is_vocabulary(dpo: Tensor, sft: Tensor, rows: tuple[int, int]) -> bool:
    same_row = len(dpo.shape) > 0 and dpo.shape[1:] == sft.shape[1:]
    return same_row and (dpo.shape[0], sft.shape[:1]) == (rows[0], (rows[1],))
