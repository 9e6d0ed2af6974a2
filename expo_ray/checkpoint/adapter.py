"""PEFT LoRA adapters: the low-rank delta that each layer adds to its weight, with its exact scale.

`W = W_sft + scale * B @ A`, so the delta of ExPO is `scale * B @ A` and the extrapolated model is the same adapter with its
scale times (1 + alpha). Variants that are not linear in the scale, or change more than that product, are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.renaming import match_names
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.errors import CheckpointError, JobError
from expo_ray.text import shown, shown_names
from expo_ray.untrusted import compile_pattern, is_ambiguous

_MERGE_FIRST = "merge the adapter first (`merge_and_unload`, save) and pass the merged folder"

# Settings of PEFT's LoraConfig that do not change the result of the adapter, or that this module takes into account. Any other
# setting that is switched on is refused, so that a future variant is not taken for plain LoRA.
_UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, CorDA, ...) move part of them into A and B.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_NAME = re.compile(
    r"base_model\.model\.(?P<module>\w[\w-]*(?:\.\w[\w-]*)*)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?P<end>\.weight)?"
)
_PREFIX = "base_model.model."
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
# A comparison takes about 1.5 us.
_MOST_COMPARISONS = 5_000_000
_MOST_EXPRESSIONS = 400


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The low-rank delta of one weight of the base model.

    Attributes:
        base_name: the weight it is added to.
        a: shape (r, in).
        b: shape (out, r).
        scale: the delta is `scale * b @ a`.
        transposed: whether the weight is stored as (in, out), so that the delta has to be transposed.
    """

    base_name: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter and the weights that it adapts.

    Attributes:
        layers: in the order they are stored; when scaling, only those whose weight the base has.
        notes: remarks for the user that are no errors.
    """

    layers: tuple[LoraLayer, ...]
    notes: tuple[str, ...] = ()


def match_lora_layers(adapter: Checkpoint, base: Checkpoint, *, merging: bool = False) -> FittedAdapter:
    """Match every layer of a plain LoRA adapter with its weight in `base`.

    PEFT names modules as `transformers` has them in memory, a checkpoint as they are stored; the two differ in the parents that
    `renaming` knows. A layer that only has to be scaled needs no weight of the base.

    Args:
        adapter: a checkpoint whose `adapter` is set.
        base: the model it was trained on.
        merging: also refuse adapters that can be rescaled but not merged: with a layer whose weight `base` lacks, or on an
            embedding that is tied to the output head, where the adapter changes one use of the weight and a merge changes both.

    Raises:
        CheckpointError: if it is not plain LoRA, or does not fit `base`.
    """
    _refuse_variants(adapter.adapter, adapter.uri)
    pairs = _pairs(adapter)
    _refuse_many_patterns(adapter.adapter, len(pairs), adapter.uri)
    names = _base_names(pairs, base)
    notes = _name_notes(names)
    absent = [f"{module}.weight" for module, name in names.items() if name is None]
    if absent and merging:
        raise CheckpointError(
            f"{adapter.uri}: adapts {len(absent)} weight(s) that {base.uri} does not have: {shown_names(absent)}; pass as sft the "
            f"model it was trained on, saved by the version of transformers that trained it, or {_MERGE_FIRST}"
        )
    if absent:
        notes.append(
            f"sft has no weight of the name of {len(absent)} layer(s) of the adapter, such as {shown_names(absent[:1])}; scaling needs "
            "none, but serve the result on the model it was trained on"
        )
    vocabulary = VocabularyWeights(base)
    if merging:
        _refuse_tied(names, vocabulary, adapter, base)
    layers = []
    for module, factors in pairs.items():
        name = names[module]
        stored = vocabulary.tensor(name) if name else None
        if name and stored:
            layers.append(_layer(adapter, module, name, factors, stored))
        else:
            _rank_and_scale(
                adapter.adapter, module, adapter.uri
            )  # only for its checks: the layer is kept as it is
    _refuse_ambiguous(layers, adapter)
    return FittedAdapter(tuple(layers), tuple(notes))


def _base_names(modules: Collection[str], base: Checkpoint) -> dict[str, str | None]:
    """The name in `base` of the weight of each adapted module; None where it has none."""
    vocabulary = VocabularyWeights(base)
    names = {module: f"{module}.weight" for module in modules}
    unknown = [name for name in names.values() if vocabulary.tensor(name) is None]
    others = match_names(unknown, [name for name in base.tensors if name not in names.values()])
    return {
        module: others.get(name) if name in unknown and name not in base.tensors else name
        for module, name in names.items()
    }


def _name_notes(names: Mapping[str, str | None]) -> list[str]:
    moved = [
        (f"{module}.weight", name) for module, name in names.items() if name not in (None, f"{module}.weight")
    ]
    if not moved:
        return []
    mine, theirs = moved[0]
    return [
        f"adapter and sft name {len(moved)} layer(s) differently, such as {shown(mine)} and {shown(theirs)}; they are paired"
    ]


def _refuse_tied(
    names: Mapping[str, str | None], vocabulary: VocabularyWeights, adapter: Checkpoint, base: Checkpoint
) -> None:
    shared = [
        name
        for name in names.values()
        if name and (vocabulary.owner(name) != name or vocabulary.has_tied_head(name))
    ]
    if shared:
        raise CheckpointError(
            f"{adapter.uri}: adapts {shown_names(shared)}, and {base.uri} ties embedding and output head, so that merging would "
            "change both; such an adapter can be scaled (`adapter: scale`), and neither merged nor served"
        )


def scaled_adapter_config(config: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """`adapter_config.json` of the same adapter with every scale times (1 + alpha).

    Raises:
        CheckpointError: if a scale is not a number.
    """
    where = "adapter_config.json"
    patterns = {
        key: _scaled(_number(value, key, where), alpha)
        for key, value in _pattern(config, "alpha_pattern", where)
    }
    lora_alpha = _scaled(_number(config.get("lora_alpha"), "lora_alpha", where), alpha)
    return {**config, "lora_alpha": lora_alpha, "alpha_pattern": patterns}


def _scaled(value: float, alpha: float) -> float:
    scaled = value * (1 + alpha)
    if not isfinite(scaled):
        raise CheckpointError(
            f"adapter_config.json: lora_alpha {value} times {1 + alpha} is no number; choose a smaller alpha"
        )
    return int(scaled) if scaled.is_integer() else scaled


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {kind}, and only plain LoRA can be rescaled; {_MERGE_FIRST}"
        )
    variants = [
        f"{key} is {shown(value, 100)}" for key, value in config.items() if value and key not in _UNDERSTOOD
    ]
    if config.get("bias", "none") != "none":
        variants.append(f"bias is {config['bias']}")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _INITIALISATIONS):
        variants.append(f"init_lora_weights is {shown(start, 100)}, which changes the base weights")
    if variants:
        raise CheckpointError(f"{where}: not plain LoRA ({'; '.join(variants)}); {_MERGE_FIRST}")


def _refuse_many_patterns(config: Mapping[str, Any], modules: int, where: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = [pattern for pattern, _ in _pattern(config, key, where)]
        operators = sum(not _PLAIN.fullmatch(pattern) for pattern in patterns)
        if operators > _MOST_EXPRESSIONS or len(patterns) * modules > _MOST_COMPARISONS:
            raise CheckpointError(
                f"{where}: {key} has {len(patterns)} entries, {operators} of them regular expressions, for {modules} modules, "
                "which would take hours to compare; save the adapter again"
            )


def _pairs(adapter: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each adapted module."""
    sides: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in adapter.tensors.items():
        match = _NAME.fullmatch(name)
        # Linear layers keep A and B as modules with a weight, embeddings as bare parameters.
        if match is None or bool(match["kind"]) == bool(match["end"]):
            others.append(name)
        else:
            sides.setdefault(match["module"], {})[(match["kind"] or "") + match["side"]] = tensor
    # PEFT stores a copy of an adapted embedding beside its A and B, which training leaves as it was.
    copies = {f"{_PREFIX}{module}.base_layer.weight" for module in sides}
    _refuse_others([name for name in others if name not in copies], adapter.uri)
    pairs = {}
    for module, factors in sides.items():
        if set(factors) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise CheckpointError(
                f"{adapter.uri}: {shown(module)} has {', '.join(f'lora_{side}' for side in sorted(factors))} instead of A and B; "
                "save the adapter again"
            )
        a, b = (factors[side] for side in sorted(factors))
        pairs[module] = (a, b)
    if not pairs:
        raise CheckpointError(f"{adapter.uri}: no lora_A and lora_B tensors; save the adapter again")
    return pairs


def _refuse_others(names: Collection[str], where: str) -> None:
    if names:
        raise CheckpointError(
            f"{where}: holds {len(names)} tensor(s) that are no LoRA matrices: {shown_names(names)}; {_MERGE_FIRST}"
        )


def _layer(
    adapter: Checkpoint, module: str, base_name: str, factors: tuple[Tensor, Tensor], base: Tensor
) -> LoraLayer:
    (a, b), base_shape = factors, base.shape
    here = f"{adapter.uri}: {shown(module)}"
    shapes = f"A {list(a.shape)}, B {list(b.shape)}, base {list(base_shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2 or len(base_shape) != 2:
        raise CheckpointError(f"{here}: not a linear layer or an embedding ({shapes}); {_MERGE_FIRST}")
    if a.dtype not in WEIGHT_DTYPES or b.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{here}: A is {a.dtype}, B is {b.dtype}; save the adapter in bf16, fp16 or fp32"
        )
    rank, scale = _rank_and_scale(adapter.adapter, module, adapter.uri)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{here}: {shapes}, and adapter_config.json says rank {rank}; save the adapter again"
        )
    delta = (b.shape[0], a.shape[1])
    flipped = delta[::-1]
    is_embedding = _is_embedding(a)
    if base_shape != flipped and (is_embedding or base_shape != delta):
        raise CheckpointError(
            f"{here}: {shapes} do not fit; pass as sft the model the adapter was trained on"
        )
    is_flipped = bool(adapter.adapter.get("fan_in_fan_out")) if delta == flipped else base_shape == flipped
    return LoraLayer(base_name, a, b, scale, is_embedding or is_flipped)


def _is_embedding(a: Tensor) -> bool:
    return a.name.endswith(".lora_embedding_A")


def _refuse_ambiguous(layers: Iterable[LoraLayer], adapter: Checkpoint) -> None:
    """Refuse an adapter whose square layers have no certain orientation.

    PEFT decides `fan_in_fan_out` layer by layer and saves the value of the last one; the shape shows the true value of every layer
    but a square one.
    """
    linear = [layer for layer in layers if not _is_embedding(layer.a)]
    square = [layer.base_name for layer in linear if layer.b.shape[0] == layer.a.shape[1]]
    declared = bool(adapter.adapter.get("fan_in_fan_out"))
    # A square layer was given the setting's orientation and cannot contradict it.
    others = [layer.base_name for layer in linear if layer.transposed != declared]
    if square and others:
        raise CheckpointError(
            f"{adapter.uri}: fan_in_fan_out is {declared}, which {shown_names(others)} contradict, so the orientation of "
            f"{shown_names(square)} is unknown; {_MERGE_FIRST}"
        )


def _rank_and_scale(config: Mapping[str, Any], module: str, where: str) -> tuple[int, float]:
    rank = _number(_by_pattern(config, "rank_pattern", module, config.get("r"), where), "r", where)
    alpha = _number(
        _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), where), "lora_alpha", where
    )
    if rank < 1 or rank != int(rank):
        raise CheckpointError(f"{where}: {shown(module)} has rank {shown(rank, 100)}; save the adapter again")
    return int(rank), alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: object, where: str) -> object:
    """Value for a module by PEFT's rule: of the first key that matches its whole name or a dotted end of it as a regex."""
    for pattern, value in _pattern(config, key, where):
        if _PLAIN.fullmatch(pattern):
            if _ends_with(module, pattern):
                return value
            continue
        if is_ambiguous(pattern):
            raise CheckpointError(
                f"{where}: {key}: the pattern {shown(pattern)!r} repeats a repetition, and PEFT would never finish matching it; save the adapter again"
            )
        try:
            compile_pattern(pattern)  # alone first, so that an error shows the pattern as it is in the file
            if compile_pattern(rf"(.*\.)?({pattern})").fullmatch(module):
                return value
        except JobError as error:
            raise CheckpointError(f"{where}: {key}: {error}; save the adapter again") from error
    return default


def _ends_with(module: str, plain: str) -> bool:
    """True if a pattern whose only operators are dots matches; adapters have one for each module, too many to compile."""
    tail, rest = module[-len(plain) :], module[: -len(plain)]
    if (rest and not rest.endswith(".")) or not tail.endswith(plain.rpartition(".")[2]):
        return False
    return len(tail) == len(plain) and all(a in (b, ".") for a, b in zip(plain, tail, strict=True))


def _pattern(config: Mapping[str, Any], key: str, where: str) -> Iterable[tuple[str, object]]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(
            f"{where}: {key} is {shown(patterns, 100)}, not an object; save the adapter again"
        )
    return patterns.items()


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise CheckpointError(f"{where}: {key} is {shown(value, 100)}, not a number; save the adapter again")
    return value
