"""Quantised checkpoints are recognised by name, so that no arithmetic is done on codes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from expo_ray.checkpoint.tensors import Checkpoint, Tensor
from expo_ray.checkpoint.text_config import text_configs

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# Parts of names that only one scheme writes.
_PARTS = {
    ".SCB": "bitsandbytes (8 bit)",
    ".absmax": "bitsandbytes (4 bit)",
    ".quant_state.": "bitsandbytes (4 bit)",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8 (block scales)",
}
_CODES = ("U8", "I8", "U16", "I16", "U32", "I32")


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """The scheme that quantised a checkpoint, or None if its weights are plain floats.

    What `config.json` declares counts first; without it names and dtypes of the tensors tell.
    """
    for config in text_configs(checkpoint.config):
        for key in _CONFIG_KEYS:
            declared = config.get(key)
            if declared:
                return _declared(declared)
    return _by_name(checkpoint.tensors) or _by_dtype(checkpoint.tensors)


def _declared(found: object) -> str:
    if not isinstance(found, Mapping):
        return str(found)
    method = (
        found.get("quant_method") or found.get("quant_algo") or found.get("format") or "an unnamed scheme"
    )
    bits = found.get("bits") or next((n for n in (4, 8) if found.get(f"load_in_{n}bit")), None)
    return f"{method} ({bits} bit)" if bits else str(method)


def _by_name(names: Collection[str]) -> str | None:
    endings = {name.rpartition(".")[2] for name in names}
    if "qweight" in endings:
        return "gptq" if "g_idx" in endings else "awq or gptq"
    for name in names:
        scheme = next((scheme for part, scheme in _PARTS.items() if part in name), None)
        if scheme:
            return scheme
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in names:
            return "mxfp4"
    return None


def _by_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    for tensor in tensors.values():
        if tensor.dtype.startswith("F8"):
            scaled = any(name.endswith(".weight_scale") for name in tensors)
            return "fp8 (with scales)" if scaled else "fp8"
        if tensor.dtype in _CODES and tensor.name.endswith(".weight"):
            return f"{tensor.dtype} weights"
    return None
