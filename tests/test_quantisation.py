from __future__ import annotations

from typing import Any

import pytest

from expo_ray.checkpoint.quantisation import quantisation_of
from expo_ray.checkpoint.tensors import Checkpoint, Tensor


def checkpoint(config: dict[str, Any], **dtypes: str) -> Checkpoint:
    tensors = {name: Tensor(name, dtype, (4, 4), "model.safetensors", 0) for name, dtype in dtypes.items()}
    return Checkpoint("memory://x", "", config, tensors, {})


PLAIN = {"model.embed_tokens.weight": "BF16", "model.layers.0.mlp.up_proj.weight": "F32"}


@pytest.mark.parametrize(
    ("declared", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (4 bit)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq (4 bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes (4 bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes (8 bit)"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "mxfp4"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"something": 1}, "an unnamed scheme"),
        ("int8", "int8"),
    ],
)  # fmt: skip
def test_the_declared_scheme(declared: Any, scheme: str) -> None:
    assert quantisation_of(checkpoint({"quantization_config": declared}, **PLAIN)) == scheme
    assert quantisation_of(checkpoint({"text_config": {"quantization_config": declared}}, **PLAIN)) == scheme


def test_older_configurations_declare_under_another_key() -> None:
    config = {"compression_config": {"format": "pack-quantized"}}
    assert quantisation_of(checkpoint(config, **PLAIN)) == "pack-quantized"


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        ({"l.qweight": "I32", "l.qzeros": "I32", "l.scales": "F16", "l.g_idx": "I32"}, "gptq"),
        ({"l.qweight": "I32", "l.qzeros": "I32", "l.scales": "F16"}, "awq or gptq"),
        ({"l.weight": "U8", "l.weight.absmax": "U8", "l.weight.quant_map": "F32"}, "bitsandbytes (4 bit)"),
        ({"l.weight": "U8", "l.weight.quant_state.bitsandbytes__nf4": "U8"}, "bitsandbytes (4 bit)"),
        ({"l.weight": "I8", "l.SCB": "F32", "l.weight_format": "U8"}, "bitsandbytes (8 bit)"),
        ({"l.weight": "F8_E4M3", "l.weight_scale_inv": "F32"}, "fp8 (block scales)"),
        ({"l.weight": "F8_E4M3", "l.weight_scale": "F32", "l.input_scale": "F32"}, "fp8 (with scales)"),
        ({"l.weight": "F8_E5M2"}, "fp8"),
        ({"l.weight_packed": "I32", "l.weight_scale": "BF16", "l.weight_shape": "I64"}, "compressed-tensors"),
        ({"e.gate_up_proj_blocks": "U8", "e.gate_up_proj_scales": "U8", "e.gate_up_proj_bias": "BF16"}, "mxfp4"),
        ({"l.weight": "I8"}, "I8 weights"),
        ({"l.weight": "U8"}, "U8 weights"),
    ],
)  # fmt: skip
def test_the_scheme_without_a_declaration(names: dict[str, str], scheme: str) -> None:
    assert quantisation_of(checkpoint({}, **PLAIN, **names)) == scheme


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": None}]
)
def test_plain_floats_and_buffers_are_not_quantised(config: dict[str, Any]) -> None:
    buffers = {
        "transformer.h.0.attn.bias": "U8", "transformer.h.0.attn.masked_bias": "BOOL", "position_ids": "I64",
        "model.layers.0.mlp.gate.e_score_correction_bias": "F32", "vision.blocks.0.scales": "F32",
        "bn.num_batches_tracked": "I64",
    }  # fmt: skip
    assert quantisation_of(checkpoint(config, **PLAIN, **buffers)) is None
