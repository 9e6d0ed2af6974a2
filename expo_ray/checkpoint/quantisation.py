"""Recognise quantised and hollow checkpoints, so that no arithmetic is done on codes or placeholders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.small_files import text_configs
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from expo_ray.errors import CheckpointError
from expo_ray.text import shown, shown_names

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# The last part of a tensor's name -> the only scheme that writes it.
_ENDINGS: Mapping[str, str] = {
    "SCB": "bitsandbytes (8 bit)",
    "absmax": "bitsandbytes (4 bit)",
    "nested_absmax": "bitsandbytes (4 bit)",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 (block scales)",
}
# The same, unless a plain weight is beside it: models use these names too.
_LIKELY_ENDINGS: Mapping[str, str] = {
    "W_q": "hqq",
    "q_weight": "exl2",
    "q_scale_max": "exl2",
    "trellis": "exl3",
    "centroids": "vptq",
    "codebooks": "aqlm",
    "_weight_qdata": "torchao",
    "qdata": "torchao",
    "B_24": "marlin",
    "qweight_packed": "spqr",
    "dense_weights": "spqr",
    "Qidxs": "quip#",
    "tcb": "higgs",
}
# Floating-point factors that codes are multiplied by, beside the codes in one module.
_FACTORS = re.compile(
    r"(^|_)(scales?|zeros?|zero_points?|absmax|amax|codebooks?|lut|centroids|biases|min|max|scb|suh|svh|s|z)(_\w+)?$",
    re.IGNORECASE,
)
_CODES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
# Integer tables that are no weights (position indices, hashes of tokens) are small beside a model.
_LARGEST_SHARE_OF_INTEGERS = 0.5


def refuse_unusable(checkpoint: Checkpoint) -> Iterator[CheckpointError]:
    """Yield an error if the weights of `checkpoint` cannot be computed with: quantised ones, and empty placeholders."""
    empty = _empty_weights(checkpoint.tensors)
    if empty:
        yield CheckpointError(
            f"{checkpoint.uri}: {len(empty)} weight(s) are empty placeholders of shape [0] ({shown_names(empty)}), as "
            "DeepSpeed ZeRO-3 saves them when it does not gather; run `zero_to_fp32.py` in the folder of the training "
            "checkpoint and pass its result, or train with `stage3_gather_16bit_weights_on_model_save: true`"
        )
    scheme = quantisation_of(checkpoint)
    if scheme and _is_stale(checkpoint):
        plain = "/".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
        yield CheckpointError(
            f"{checkpoint.uri}: config.json declares that the weights are quantised ({scheme}), and all "
            f"{len(checkpoint.tensors)} tensors are plain {plain}; if the model was merged or dequantised, remove "
            f"`{_declaring_key(checkpoint)}` from config.json"
        )
    elif scheme:
        yield CheckpointError(
            f"{checkpoint.uri} is quantised ({scheme}); extrapolate the checkpoint it was made from, in bf16, fp16 or fp32, "
            "and quantise the result"
        )


def _empty_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of weights of shape [0], as DeepSpeed ZeRO-3 leaves them in a state dict that was not gathered."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.shape == (0,) and tensor.dtype in WEIGHT_DTYPES and not is_constant(tensor)
    ]


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """Name of the scheme that quantised a checkpoint; None if its weights are plain floats.

    Taken from `config.json`, else from the names and dtypes of the tensors. The `config.json` beside an adapter belongs to its base
    model and is ignored.
    """
    declared = None if checkpoint.adapter else _declaration(checkpoint.config)
    if declared:
        return _declared(declared[1])
    return _by_tensors(checkpoint.tensors)


def _is_stale(checkpoint: Checkpoint) -> bool:
    """True if the declaration in `config.json` is out of date: every tensor is plain."""
    return bool(checkpoint.tensors) and _by_tensors(checkpoint.tensors) is None


def _declaration(config: Mapping[str, Any]) -> tuple[str, object] | None:
    """Key and value of the declaration, if any."""
    for part in text_configs(config):
        for key in _CONFIG_KEYS:
            declared = part.get(key)
            # BitNet's master weights are plain; its layers quantise them at each forward pass.
            online = isinstance(declared, Mapping) and declared.get("quantization_mode") == "online"
            if declared and not online:
                return key, declared
    return None


def _declaring_key(checkpoint: Checkpoint) -> str:
    declared = _declaration(checkpoint.config)
    return declared[0] if declared else _CONFIG_KEYS[0]


def _declared(declared: object) -> str:
    if not isinstance(declared, Mapping):
        return shown(declared)
    method = (
        declared.get("quant_method")
        or declared.get("quant_algo")
        or declared.get("format")
        or "an unnamed scheme"
    )
    bits = declared.get("bits") or next((n for n in (4, 8) if declared.get(f"load_in_{n}bit")), None)
    return f"{shown(method)} ({shown(bits)} bit)" if bits else shown(method)


def _by_tensors(tensors: Mapping[str, Tensor]) -> str | None:
    return _by_name(tensors) or _by_dtype(tensors)


def _by_name(tensors: Mapping[str, Tensor]) -> str | None:
    endings = {name.rpartition(".")[2] for name in tensors}
    if "qweight" in endings:
        return "gptq" if "g_idx" in endings else "awq or gptq"
    if "weight._data" in {".".join(name.split(".")[-2:]) for name in tensors if name.endswith("._data")}:
        return "quanto"
    if any(".quant_state." in name for name in tensors):
        return "bitsandbytes (4 bit)"
    return next(filter(None, (_by_ending(tensor, tensors) for tensor in tensors.values())), None)


def _by_ending(tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    name = tensor.name
    ending = name.rpartition(".")[2]
    if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
        return "mxfp4"
    if name.endswith(".centroids.weight"):
        ending, name = "centroids", name.removesuffix(".weight")
    likely = _LIKELY_ENDINGS.get(ending)
    if likely and (tensor.dtype not in WEIGHT_DTYPES or not _has_plain_weight(name, tensors)):
        return likely
    return _ENDINGS.get(ending)


def _has_plain_weight(name: str, tensors: Mapping[str, Tensor]) -> bool:
    weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and weight.dtype in WEIGHT_DTYPES


def _by_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    for tensor in tensors.values():
        if tensor.dtype.startswith("F8"):
            scaled = any(name.endswith((".weight_scale", ".scale_weight")) for name in tensors)
            return "fp8 (with scales)" if scaled else "fp8"
        if tensor.dtype in _CODES and tensor.name.endswith(".weight"):
            return f"{tensor.dtype} weights"
    return _by_factors(tensors) or _by_share(tensors)


def _by_factors(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise integer matrices with floating-point factors beside them, in a module without another weight."""
    modules: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        modules.setdefault(name.rpartition(".")[0], []).append(tensor)
    for module, inside in modules.items():
        # No scheme stores its codes in 64 bits, but tables of indices have 64.
        codes = [tensor for tensor in inside if _is_code(tensor) and tensor.dtype not in ("U64", "I64")]
        factors = [
            tensor
            for tensor in inside
            if tensor.dtype in WEIGHT_DTYPES and _FACTORS.search(tensor.name.rpartition(".")[2])
        ]
        larger = sum(code.nbytes for code in codes) >= sum(factor.nbytes for factor in factors)
        if module and codes and factors and larger and not _has_plain_weight(codes[0].name, tensors):
            return f"integer codes in {shown(codes[0].name)}, with factors in {shown(factors[0].name)}"
    return None


def _by_share(tensors: Mapping[str, Tensor]) -> str | None:
    codes = [tensor for tensor in tensors.values() if _is_code(tensor)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    if sum(tensor.nbytes for tensor in codes) > _LARGEST_SHARE_OF_INTEGERS * max(1, total):
        return f"integer codes, such as {shown(codes[0].name)}"
    return None


def _is_code(tensor: Tensor) -> bool:
    return tensor.dtype in _CODES and len(tensor.shape) > 1 and not is_constant(tensor)
