"""Which tensor of sft belongs to which tensor of dpo, and what each output tensor is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from expo_ray.checkpoint.adapter import LoraLayer
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Checkpoint, Tensor
from expo_ray.checkpoint.tied import embedding_name, tied_alias
from expo_ray.checkpoint.vocabulary import RowRun
from expo_ray.config import PairOptions
from expo_ray.errors import ExpoError, PairError, some

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
        multiplier: alpha times this is the alpha of the tensor.
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
    return next((value for pattern, value in options.multipliers.items() if re.search(pattern, name)), 1.0)


def match_tensors(
    sft: Checkpoint, dpo: Checkpoint, options: PairOptions, map_rows: Callable[[int, int], Sequence[RowRun]]
) -> Match:
    """Pair every tensor of dpo with its partner in sft by name.

    Args:
        map_rows: `(dpo_rows, sft_rows) -> runs`, asked only where the vocabularies differ and `vocab` allows it.
    """
    match = Match()
    missing: list[str] = []
    misshapen: list[str] = []
    runs: dict[tuple[int, int], tuple[RowRun, ...]] = {}
    dpo_tied = tied_alias(dpo.tensors, dpo.config)
    sft_tied = tied_alias(sft.tensors, sft.config)
    rows = _embedding_rows(dpo), _embedding_rows(sft)
    for name, tensor in dpo.tensors.items():
        plan = _plan_alone(tensor, options, dpo_tied.get(name, name))
        partner = sft.tensors.get(name) or sft.tensors.get(sft_tied.get(name, ""))
        match.tensors.append(plan)
        if tensor.dtype not in WEIGHT_DTYPES or plan.multiplier == 0:
            continue
        if partner is None:
            (match.notes if _KNOWN_BUFFERS.search(name) else missing).append(name)
        elif partner.dtype not in WEIGHT_DTYPES:
            misshapen.append(f"{name}: dpo is {tensor.dtype}, sft is {partner.dtype}")
        elif partner.shape == tensor.shape:
            match.tensors[-1] = _with(plan, partner)
        elif _is_vocabulary(tensor, partner, rows):
            if options.vocab == "refuse":
                misshapen.append(f"{name}: dpo has {tensor.shape[0]} rows, sft has {partner.shape[0]}")
                continue
            sizes = tensor.shape[0], partner.shape[0]
            if sizes not in runs:
                runs[sizes] = tuple(map_rows(*sizes))
            match.tensors[-1] = _with(plan, partner, runs[sizes])
        else:
            misshapen.append(f"{name}: dpo has shape {list(tensor.shape)}, sft has {list(partner.shape)}")
    match.notes = [f"{name} is in dpo only and kept as it is" for name in match.notes]
    extra = [
        name
        for name, tensor in sft.tensors.items()
        if name not in dpo.tensors
        and name not in dpo_tied
        and tensor.dtype in WEIGHT_DTYPES
        and not _KNOWN_BUFFERS.search(name)
        and multiplier_of(name, options) != 0
    ]
    match.problems = list(_problems(missing, extra, misshapen, rows))
    return match


def _plan_alone(tensor: Tensor, options: PairOptions, random_name: str) -> TensorPlan:
    return TensorPlan(
        name=tensor.name,
        dtype=output_dtype(tensor.dtype, options),
        shape=tensor.shape,
        dpo=tensor,
        sft=None,
        multiplier=multiplier_of(tensor.name, options),
        random_name=random_name,
    )


def _with(plan: TensorPlan, partner: Tensor, runs: tuple[RowRun, ...] = ()) -> TensorPlan:
    return TensorPlan(
        plan.name, plan.dtype, plan.shape, plan.dpo, partner, plan.multiplier, runs, plan.random_name
    )


def _embedding_rows(checkpoint: Checkpoint) -> int:
    name = embedding_name(checkpoint.tensors)
    return checkpoint.tensors[name].shape[0] if name else 0


def _is_vocabulary(dpo: Tensor, sft: Tensor, rows: tuple[int, int]) -> bool:
    same_row = len(dpo.shape) > 0 and dpo.shape[1:] == sft.shape[1:]
    return same_row and (dpo.shape[0], sft.shape[:1]) == (rows[0], (rows[1],))


def _problems(
    missing: list[str], extra: list[str], misshapen: list[str], rows: tuple[int, int]
) -> Iterable[ExpoError]:
    if missing:
        yield PairError(
            f"sft lacks {len(missing)} tensor(s) of dpo: {some(missing)}; give two whole checkpoints of one "
            "architecture, or keep dpo's with `multipliers: {<pattern>: 0}`"
        )
    if extra:
        yield PairError(
            f"sft has {len(extra)} tensor(s) that dpo lacks: {some(extra)}; give two whole checkpoints of one "
            "architecture, or leave them out with `multipliers: {<pattern>: 0}`"
        )
    vocabulary = [text for text in misshapen if " rows, " in text]
    if vocabulary:
        yield PairError(
            f"vocabularies differ, dpo has {rows[0]} rows and sft {rows[1]} ({some(vocabulary)}); set `vocab: by-token` "
            "to match rows through both tokenizers, or `vocab: keep-dpo` to leave the extra rows as in dpo"
        )
    others = [text for text in misshapen if " rows, " not in text]
    if others:
        yield PairError(
            f"{len(others)} tensor(s) do not fit: {some(others)}; sft and dpo must be of one architecture and size"
        )
